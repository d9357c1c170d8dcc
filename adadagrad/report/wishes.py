r"""Which batch sizes the tests would ask for, from the averaged statistics of a stretch. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adadagrad.policies.interval import student_quantile
from adadagrad.report.noise import CONFIDENCE, NoiseScale
from adadagrad.report.run import StepRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A batch size that a test asks for, and between which sizes it lies with a confidence of 0.95.

    Args:
        value: In examples; infinite where it is not known.
        low: Lower end.
        high: Upper end, may be infinite.
    """

    value: float
    low: float
    high: float

    def larger(self, other: Wish) -> Wish:
        """Return what two tests ask for together: the larger of values and of ends."""
        return Wish(value=max(self.value, other.value), low=max(self.low, other.low), high=max(self.high, other.high))


def norm_wish(noise: NoiseScale, eta: float) -> Wish:
    r"""Return the smallest batch that passes the norm test, measured at that very batch.

    .. math:: \frac{V}{b} \le \eta^2 s, \quad E\,s = \|\nabla F\|^2 + \frac{V}{b}
              \quad\Longrightarrow\quad b = \frac{1 - \eta^2}{\eta^2} B, \qquad B = \frac{V}{\|\nabla F\|^2}

    In code: the test holds a batch's variance V/b against the length s of the same batch's gradient, which contains
    that variance. A single test at a smaller batch, V / (eta^2 s), therefore asks for less than this size, and a run
    gets there in several decisions; at this size it asks for no more. Right where b is a small part of the data set.

    Args:
        noise: B with its error.
        eta: The norm test's, > 0; from 1 on every batch passes on average.

    Returns:
        The size.

    Source: this project, from the test of Byrd, Chin, Nocedal, Wu (2012), eq. 3.9 (verified in f-dangel/cockpit).

    Example:
        >>> norm_wish(NoiseScale(inverse=0.01, error=0.0, freedom=9), eta=0.5).value
        300.0
    """
    factor = max(0.0, (1 - eta**2) / eta**2)
    low, high = noise.interval()
    return Wish(value=factor * noise.value, low=factor * low, high=factor * high)


def inner_product_wish(rows: Sequence[StepRow], theta: float) -> Wish | None:
    r"""Return what the inner product test asks for at the batch size at which it was measured.

    .. math:: T = \frac{\bar V_p}{\theta^2 \bar s^2}, \qquad
              \sigma_T = \frac{1}{\theta^2 \bar s^2}
              \sqrt{\frac{1}{n(n-1)} \sum_t \Bigl(V_{p,t} - \bar V_p - \frac{2 \bar V_p}{\bar s}(s_t - \bar s)\Bigr)^2}

    In code: averages over the stretch's steps of the inner product variance and of s, each step at the same batch
    size; the error to first order.

    Not a fixed point like `norm_wish`: V_p is the variance of <g_i, g> with a g that holds noise itself, so it falls as
    the batch grows, from grad F' Sigma grad F + tr(Sigma^2)/b to the first term alone, and one batch size does not
    tell the two apart. A size of at most the measured one means that the test passes there.

    Args:
        rows: The stretch's steps, at least two.
        theta: The inner product test's, > 0.

    Returns:
        The size; None where inner products were not measured.

    Source: this project, from the test of Bollapragada, Byrd, Nocedal (2017), arXiv 1710.11258, eq. 2.6 (as cited by
        f-dangel/cockpit, inner_test.py).
    """
    numbers = _numbers(rows)
    if numbers is None:
        return None
    mean_s, mean_vp = (sum(column) / len(rows) for column in (numbers[0], numbers[2]))
    shifts = [vp - mean_vp - 2 * mean_vp / mean_s * (s - mean_s) for s, _, vp in zip(*numbers, strict=True)]
    return _wish(mean_vp, shifts, theta**2 * mean_s**2)


def orthogonality_wish(rows: Sequence[StepRow], nu: float) -> Wish | None:
    r"""Return what the orthogonality test asks for at the batch size at which it was measured.

    .. math:: T = \frac{\bar V - \bar V_p / \bar s}{\nu^2 \bar s}

    In code: as `inner_product_wish`, with which it makes up the augmented test; the error likewise to first order.

    Args:
        rows: The stretch's steps, at least two.
        nu: The augmented test's, > 0.

    Returns:
        The size; None where inner products were not measured.

    Source: this project, from the test of Bollapragada, Byrd, Nocedal (2017), arXiv 1710.11258, eq. 3.3 (as cited by
        f-dangel/cockpit, ortho_test.py).
    """
    numbers = _numbers(rows)
    if numbers is None:
        return None
    mean_s, mean_v, mean_vp = (sum(column) / len(rows) for column in numbers)
    across = mean_v - mean_vp / mean_s
    slope = (2 * mean_vp / mean_s - mean_v) / mean_s  # of V/s - V_p/s^2 in s, times s
    shifts = [v - mean_v - (vp - mean_vp) / mean_s + slope * (s - mean_s) for s, v, vp in zip(*numbers, strict=True)]
    return _wish(across, shifts, nu**2 * mean_s)


def mean_wish(wishes: Sequence[Wish], weights: Sequence[float]) -> Wish:
    """Average what was asked for in several stretches, their errors being independent.

    Args:
        wishes: At least one.
        weights: As many, > 0.

    Returns:
        The mean; its ends from the root of the sum of squares on either side.
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    value = sum(share * wish.value for share, wish in zip(shares, wishes, strict=True))
    down = math.hypot(*(share * (wish.value - wish.low) for share, wish in zip(shares, wishes, strict=True)))
    up = math.hypot(*(share * (wish.high - wish.value) for share, wish in zip(shares, wishes, strict=True)))
    return Wish(value=value, low=max(0.0, value - down), high=value + up)


def _numbers(rows: Sequence[StepRow]) -> tuple[list[float], list[float], list[float]] | None:
    """Columns s, V and V_p; None where one is missing or the gradient is zero throughout."""
    columns = (
        [row.grad_norm_sq for row in rows],
        [row.variance_trace for row in rows],
        [row.inner_product_variance for row in rows],
    )
    s, v, vp = ([x for x in column if x is not None and math.isfinite(x)] for column in columns)
    whole = len(s) == len(v) == len(vp) == len(rows)
    return (s, v, vp) if whole and sum(s) > 0 else None


def _wish(numerator: float, shifts: Sequence[float], denominator: float) -> Wish:
    """A quotient of means, with what each step adds to its numerator's error."""
    n = len(shifts)
    error = math.sqrt(sum(shift**2 for shift in shifts) / (n * (n - 1))) / denominator
    reach = student_quantile((1 + CONFIDENCE) / 2, n - 1) * error
    value = max(0.0, numerator / denominator)
    return Wish(value=value, low=max(0.0, value - reach), high=value + reach)
