r"""How sure a requested batch size is: the policy's own formula at the ends of what V and s may be. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from statistics import NormalDist

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import BatchSizePolicy
from adadagrad.core.records import GradientStatistics, Observation

LEVEL = 0.9
"""Confidence of each end of a logged interval where `Bounds.confidence` does not name another."""

ERRORS = {"variance_trace": "variance_trace_error", "grad_norm_sq": "grad_norm_sq_error"}
"""The statistics whose standard error a record may hold, and its name."""


def requested_interval(
    policy: BatchSizePolicy, observation: Observation, confidence: float = LEVEL
) -> tuple[float, float] | None:
    r"""Return the batch sizes that the policy would ask for if V and s were off by their standard errors.

    .. math:: \Bigl[ \min T(V', s'), \; \max T(V', s') \Bigr], \qquad
              V' \in \{V - q\,\sigma_V, \; V + q\,\sigma_V\}, \quad s' \in \{s - q\,\sigma_s, \; s + q\,\sigma_s\}

    In code: T is `required_batch_size`, sigma the errors in the record, q the `student_quantile` with two degrees of
    freedom less than there are units. V' and s' are never below 0.

    Right for every policy whose answer rises or falls with V, and with s, throughout. Each end is one-sided: the size
    that exact statistics would ask for lies above the lower one in a share of `confidence` of all cases or more, and
    below the upper one likewise, as far as the errors are right; so between them in 2 confidence - 1. Both numbers are
    taken at their worst together, so the interval is rather too wide. Where the error of s is not known the interval is
    that of V alone, and may be much too narrow: the error of s is usually the larger one (`errors_known` tells). Four
    evaluations of the policy.

    Args:
        policy: The policy.
        observation: What the step has shown.
        confidence: Of each end, in (0.5, 1).

    Returns:
        The ends, in examples, neither rounded nor bounded; the upper one is infinite where s may be 0. None where there
        is no measurement, where the policy reads a number whose error is not measured (the inner product and
        coordinate-wise tests do), or where the error of V is not known.

    Source: this project.

    Example:
        >>> from adadagrad.policies.norm import NormTest
        >>> stats = GradientStatistics(num_examples=8, grad_norm_sq=4.0, variance_trace=9.0, variance_trace_error=1.0)
        >>> low, high = requested_interval(NormTest(eta=0.5), Observation(gradient=stats))
        >>> round(low, 2), round(high, 2)  # 9 -+ 1.44, 6 degrees of freedom
        (7.56, 10.44)
    """
    statistics = observation.gradient
    if statistics is None or not policy.needs:
        return None
    missing = _missing(policy, statistics)
    shifted = policy.needs - missing
    if not shifted or missing - {"grad_norm_sq"}:
        return None
    units = statistics.num_units if statistics.num_units is not None else statistics.num_examples
    q = student_quantile(confidence, max(units - 2, 1))
    ranges = []
    for name in sorted(shifted):
        value, error = getattr(statistics, name), getattr(statistics, ERRORS[name])
        ranges.append([(name, max(value - q * error, 0.0)), (name, value + q * error)])
    answers = []
    for corner in product(*ranges):
        gradient = replace(statistics, **dict(corner))
        answers.append(_answer(policy, replace(observation, gradient=gradient)))
    known = [answer for answer in answers if not math.isnan(answer)]
    return (min(known), max(known)) if known else None


def errors_known(policy: BatchSizePolicy, statistics: GradientStatistics) -> bool:
    """Return whether the standard error of every number that the policy reads is known.

    Args:
        policy: The policy.
        statistics: What was measured.

    Returns:
        True for a schedule, which reads none.
    """
    return not _missing(policy, statistics)


def student_quantile(probability: float, freedom: int) -> float:
    r"""Return the quantile of Student's t distribution: how many standard errors to allow, estimated ones at that.

    Exact for one and two degrees of freedom; from three on, the expansion around the normal quantile to order
    freedom^-4, whose relative error is below 0.5 % for probabilities up to 0.99.

    Args:
        probability: In (0, 1).
        freedom: Degrees of freedom, >= 1.

    Returns:
        The quantile, dimensionless; above 0 for probabilities above 0.5.

    Raises:
        InvalidArgument: An argument is out of range.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5 (from memory; checked against tabulated
        quantiles in the tests).

    Example:
        >>> [round(student_quantile(0.9, freedom), 2) for freedom in (1, 2, 3, 1000)]
        [3.08, 1.89, 1.64, 1.28]
    """
    if not 0 < probability < 1 or freedom < 1:
        raise InvalidArgument(f"need 0 < probability < 1 and freedom >= 1, got {probability} and {freedom}")
    p = probability
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z, n = NormalDist().inv_cdf(p), freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def _missing(policy: BatchSizePolicy, statistics: GradientStatistics) -> frozenset[str]:
    """Return which of the numbers that the policy reads have no standard error."""
    errors = {name: getattr(statistics, ERRORS[name]) for name in policy.needs if name in ERRORS}
    return policy.needs - {name for name, error in errors.items() if error is not None and math.isfinite(error)}


def _answer(policy: BatchSizePolicy, observation: Observation) -> float:
    """Return what the policy asks for; NaN where its arithmetic ends, at a logarithm of zero, say.

    The numbers were not measured, and an interval that is only logged must not stop a run.
    """
    try:
        return policy.required_batch_size(observation)
    except (ArithmeticError, ValueError):
        return math.nan
