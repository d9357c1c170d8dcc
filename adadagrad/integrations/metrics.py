"""A decision as plain numbers by name, for the logger of a host."""

from __future__ import annotations

import math

from adadagrad.core.records import Decision


def decision_metrics(decision: Decision) -> dict[str, float]:
    """Return what a step has shown and decided, as far as it is known and finite.

    Args:
        decision: What ``step.update()`` returned.

    Returns:
        ``samples_seen``, ``global_batch_size``, ``next_global_batch_size`` and, where there are such numbers, ``loss``,
        ``lr``, ``requested_batch_size``, ``noise_scale``, ``grad_norm_sq`` and ``variance_trace``, with ``adadagrad/``
        before each name.

    Example:
        >>> from adadagrad.core.records import BatchPlan, Decision, Observation
        >>> plan = BatchPlan(global_batch_size=8, micro_batch_size=8, accumulation_steps=1)
        >>> seen = Observation(loss=0.5, global_batch_size=8)
        >>> decision_metrics(
        ...     Decision(step=1, samples_seen=8, progress=8, observation=seen, requested=None, plan=plan,
        ...              next_plan=plan, lr=0.1, reason="not measured")
        ... )
        {'adadagrad/samples_seen': 8, 'adadagrad/global_batch_size': 8, 'adadagrad/next_global_batch_size': 8,
        'adadagrad/loss': 0.5, 'adadagrad/lr': 0.1}
    """
    seen = decision.observation
    found: dict[str, float | None] = {
        "samples_seen": decision.samples_seen,
        "global_batch_size": seen.global_batch_size,
        "next_global_batch_size": decision.next_plan.global_batch_size,
        "loss": seen.loss,
        "lr": decision.lr,
        "requested_batch_size": decision.requested,
    }
    if seen.gradient is not None:
        found |= {
            "noise_scale": seen.gradient.noise_scale,
            "grad_norm_sq": seen.gradient.grad_norm_sq,
            "variance_trace": seen.gradient.variance_trace,
        }
    return {f"adadagrad/{name}": value for name, value in found.items() if value is not None and math.isfinite(value)}
