"""What `Bounds(confidence=...)` takes: a policy, an estimator and enough units to say how sure a request is."""

from __future__ import annotations

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import BatchSizePolicy
from adadagrad.core.settings import Bounds, Measure
from adadagrad.engine.measuring import unwrapped
from adadagrad.policies.interval import ERRORS
from adadagrad.statistics import MicroBatch, Probe, Worker

UNITS = 3
"""Fewest units from which a standard error can be had."""


def check_confidence(bounds: Bounds, policy: BatchSizePolicy, measure: Measure | None) -> None:
    """Refuse a confidence that nothing could ever reach: every step would hold.

    A schedule asks for what it asks for with certainty, so that any confidence goes with it and changes nothing.

    Args:
        bounds: The user's rule.
        policy: The policy.
        measure: The user's settings; None measures with the defaults.

    Raises:
        InvalidArgument: The policy reads a number whose standard error is not measured, or too few units or probes
            would be measured for one.
    """
    if bounds.confidence is None or not policy.needs:
        return
    unknown = sorted(policy.needs - set(ERRORS))
    if unknown:
        raise InvalidArgument(
            f"confidence={bounds.confidence} needs a policy whose request has a standard error, and there is "
            f"none for {unknown[0]}, which {type(policy).__name__} reads: use NormTest, or leave confidence out"
        )
    settings = Measure() if measure is None else measure
    estimator = unwrapped(settings.estimator, policy)[0]
    if isinstance(estimator, Probe) and estimator.probes < 2:
        raise InvalidArgument(
            f"confidence={bounds.confidence} needs a standard error, which takes 2 probes, got {estimator!r}: "
            "give it probes=2 or more"
        )
    if isinstance(estimator, Worker):
        raise InvalidArgument(
            f"confidence={bounds.confidence} needs a standard error, and there is none for V from ranks: use another "
            "estimator than Worker(), or leave confidence out"
        )
    if isinstance(estimator, MicroBatch):
        if estimator.units < UNITS:
            raise InvalidArgument(
                f"confidence={bounds.confidence} needs a standard error, which takes {UNITS} micro-batches, got "
                f"{estimator!r}: give it units={UNITS} or more"
            )
    elif settings.max_examples is not None and settings.max_examples < UNITS:
        raise InvalidArgument(
            f"confidence={bounds.confidence} needs a standard error, which takes {UNITS} examples, got "
            f"max_examples={settings.max_examples}: raise it"
        )
