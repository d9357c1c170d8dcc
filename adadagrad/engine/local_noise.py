"""Which estimator measures under local steps, and which settings contradict them."""

from __future__ import annotations

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import BatchSizePolicy, LearningRateRule
from adadagrad.parallel import AbstractParallel
from adadagrad.statistics import Worker
from adadagrad.statistics.base import AbstractEstimator

RATIO = frozenset({"grad_norm_sq", "variance_trace"})
"""What a policy reads that the units of the noise cannot mislead."""


def for_local_steps(
    parallel: AbstractParallel,
    given: AbstractEstimator | None,
    policy: BatchSizePolicy,
    rate: LearningRateRule | None,
    *,
    errors: bool,
) -> AbstractEstimator:
    """Return the estimator for ranks that train apart from each other.

    Args:
        parallel: How they do.
        given: The user's estimator, None for ``"auto"``.
        policy: The policy.
        rate: The learning-rate rule, or None.
        errors: Whether requests must have a standard error.

    Returns:
        The user's, which measures inside each rank, or `Worker()`.

    Raises:
        InvalidArgument: A policy, rule or estimator wants what there is not.
    """
    if policy.averaging == "epoch":
        raise InvalidArgument(
            f"{policy!r} adds up the gradients of an epoch, and under local steps each rank has its own: use NormTest "
            "or GradientNoiseScale, or DistributedDataParallel"
        )
    if policy.coordinate_reduction is not None:
        raise InvalidArgument(
            f"{policy!r} reads variances by coordinate, which local steps do not give: use NormTest, or "
            "DistributedDataParallel"
        )
    if parallel.shows_noise:
        _check_drifts(given, policy, rate)
    if errors and (given is None or isinstance(given, Worker)):
        raise InvalidArgument(
            "confidence needs a standard error, and under local steps there is none for V from ranks: give "
            "Measure(estimator=PerExample()), which measures inside each rank, or leave confidence out"
        )
    return Worker() if given is None else given


def _check_drifts(given: AbstractEstimator | None, policy: BatchSizePolicy, rate: LearningRateRule | None) -> None:
    """Refuse what reads more of the drifts than a ratio, or measures beside them."""
    if policy.needs and policy.needs != RATIO:
        raise InvalidArgument(
            f'noise="drifts" is in units of a step, and {policy!r} reads more of it than a ratio: use NormTest or '
            'GradientNoiseScale, or noise="gradients"'
        )
    if rate is not None and rate.needs:
        raise InvalidArgument(f'noise="drifts" comes after the update that {rate!r} scales: use noise="gradients"')
    if given is not None:
        raise InvalidArgument(
            f'noise="drifts" takes the place of an estimator, got {given!r}: leave it out, or use noise="gradients"'
        )
