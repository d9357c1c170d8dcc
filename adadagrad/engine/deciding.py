"""The decision after a step: ask the policy where it can answer, and bound what it says. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adadagrad.core.protocols import BatchSizePolicy
from adadagrad.core.records import Observation
from adadagrad.core.settings import Bounds
from adadagrad.policies.bounds import next_batch_size
from adadagrad.policies.interval import LEVEL, errors_known, requested_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a step's decision is.

    Args:
        size: The next batch size.
        requested: What the policy asked for, before rounding and bounds; None where it was not asked.
        interval: Ends of what it might have asked for; see `requested_interval`.
        reason: In a word what happened; empty where the step was not measured.
    """

    size: int
    requested: float | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""


def decide(
    policy: BatchSizePolicy,
    observation: Observation,
    *,
    current: int,
    bounds: Bounds,
    minimum: int,
    measurable: int,
    maximum: int,
) -> Answer:
    """Return the next batch size, what the policy asked for and how sure that is, and in a word what happened.

    Args:
        policy: The policy.
        observation: What the step has shown; a test without its statistics is not asked.
        current: The size planned for the step just taken.
        bounds: The user's rule.
        minimum: Fewest examples that the user allows.
        measurable: Fewest examples that a test can be measured on; schedules may go below.
        maximum: The cap.

    Returns:
        The answer.
    """
    statistics = observation.gradient
    if policy.needs:
        if statistics is None:
            return Answer(size=current)
        if any(getattr(statistics, name) is None for name in policy.needs):
            return Answer(size=current, reason="not available yet")
    try:
        requested = policy.required_batch_size(observation)
    except ZeroDivisionError:  # a policy written with plain divisions, at a gradient of zero: it has no answer
        requested = math.nan
    interval = None
    if statistics is not None and not math.isnan(requested):
        interval = requested_interval(policy, observation, bounds.confidence or LEVEL)
    whole = statistics is not None and errors_known(policy, statistics)
    size, reason = next_batch_size(
        requested,
        current=current,
        bounds=bounds,
        monotone=policy.monotone,
        minimum=max(minimum, measurable) if policy.needs else minimum,
        maximum=maximum,
        interval=(interval if whole else None) if policy.needs else (requested, requested),
    )
    return Answer(size=size, requested=requested, interval=interval, reason=reason)


def is_final(policy: BatchSizePolicy, current: int, bounds: Bounds, maximum: int) -> bool:
    """Return whether no measurement can change the batch size any more: a monotone test at its cap.

    Args:
        policy: The policy.
        current: The present batch size.
        bounds: The user's rule.
        maximum: The cap.

    Returns:
        True where measuring would be wasted.
    """
    monotone = policy.monotone if bounds.monotone is None else bounds.monotone
    return bool(policy.needs) and monotone and current >= maximum - maximum % bounds.multiple_of
