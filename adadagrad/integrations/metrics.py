"""A decision as plain numbers by name, for a trainer's own logger, whose axis counts steps."""

from __future__ import annotations

import math

from adadagrad.core.records import Decision
from adadagrad.integrations.trackers.metrics import PREFIX, metrics_of


def decision_metrics(decision: Decision) -> dict[str, float]:
    """Return what a step has shown and decided, as far as it is known and finite.

    Args:
        decision: What ``step.update()`` returned.

    Returns:
        The numbers of `adadagrad.integrations.trackers.metrics_of`, and ``adadagrad/samples_seen``, the axis to choose.

    Example:
        >>> from adadagrad.core.records import BatchPlan, Decision, Observation
        >>> plan = BatchPlan(global_batch_size=8, micro_batch_size=8, accumulation_steps=1)
        >>> seen = Observation(loss=float("nan"), global_batch_size=8)
        >>> found = decision_metrics(
        ...     Decision(step=1, samples_seen=8, progress=8, observation=seen, requested=None, plan=plan,
        ...              next_plan=plan, lr=0.1, reason="not measured")
        ... )
        >>> found["adadagrad/samples_seen"], found["adadagrad/lr"], "adadagrad/loss" in found
        (8.0, 0.1, False)
    """
    found = {PREFIX + "samples_seen": float(decision.samples_seen), **metrics_of(decision)}
    return {name: value for name, value in found.items() if math.isfinite(value)}
