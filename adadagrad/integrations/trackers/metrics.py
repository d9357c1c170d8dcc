"""What a step has to tell a tracker: the numbers of its line in run.jsonl, under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adadagrad.core.protocols import BatchSizePolicy
from adadagrad.core.records import Decision
from adadagrad.engine.log_records import step_record
from adadagrad.integrations.trackers.base import Tracker

PREFIX = "adadagrad/"
"""Before the name of each of a step's numbers, so that none is taken for one of the user's."""
STEP = PREFIX + "step"
"""The optimizer step, which trackers with one axis are given as a number."""
PLACES = ("step", "samples_seen")
"""What says where in the run a line is; these go beside the numbers."""


def metrics_of(decision: Decision, policy: BatchSizePolicy | None = None) -> dict[str, float]:
    """Return a step's numbers: batch size, loss, learning rate, noise, and what the policy asked for.

    Args:
        decision: What `update` returned.
        policy: The engine's; with it the two sides of its test, where it is one.

    Returns:
        By the names of docs/run-log.md, each after ``adadagrad/``; what is not known is left out.

    Example:
        >>> from adadagrad.core.records import BatchPlan, Observation
        >>> plan = BatchPlan(global_batch_size=64, micro_batch_size=64, accumulation_steps=1)
        >>> seen = Observation(global_batch_size=64, samples_seen=640, loss=0.5)
        >>> decision = Decision(step=10, samples_seen=640, progress=640, observation=seen, requested=None, plan=plan,
        ...                     next_plan=plan, lr=0.1, reason="not measured")
        >>> metrics_of(decision)["adadagrad/loss"]
        0.5
    """
    threshold = None if policy is None else policy.threshold
    record = step_record(decision, samples_drawn=decision.samples_seen, threshold=threshold)
    return numbers_of({name: value for name, value in record.items() if name != "samples_drawn"})


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a step's line.

    Args:
        record: The line; its NaN and infinities may be the words that stand for them in JSON.

    Returns:
        By name, each after ``adadagrad/``.

    Example:
        >>> numbers_of({"kind": "step", "step": 3, "samples_seen": 96, "loss": "nan", "measured": True, "lr": 0.1})
        {'adadagrad/loss': nan, 'adadagrad/lr': 0.1}
    """
    return {PREFIX + name: float(value) for name, value in record.items() if name not in PLACES and is_number(value)}


def is_number(value: object) -> bool:
    """Return whether a value of the log is a number, or a word that stands for one.

    Args:
        value: Any.
    """
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")


def track(decision: Decision, tracker: Tracker, policy: BatchSizePolicy | None = None) -> None:
    """Log a step: one line in a loop over the engine.

    Args:
        decision: What `update` returned.
        tracker: Where to.
        policy: The engine's, as for `metrics_of`.
    """
    tracker.log(metrics_of(decision, policy), samples_seen=decision.samples_seen, step=decision.step)
