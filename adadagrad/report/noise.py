r"""The noise scale of a run, stretch by stretch, and how sure it is. Pure arithmetic over the lines of the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from adadagrad.policies.interval import student_quantile
from adadagrad.report.run import Run, StepRow

CONFIDENCE = 0.95
"""How often an interval should hold the truth: 2.5 % on either side."""

LEAST_STEPS = 10
"""Fewest measured steps of a stretch."""

STRETCHES = 8
"""Most stretches that a run is cut into."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseScale:
    r"""B = V / |grad F|^2 with its error, held as 1/B, whose error is symmetric and which may be 0 or, by chance, less.

    .. math:: x = \bar G / \bar V = 1/B, \qquad
              \sigma_x = \frac{1}{\bar V} \sqrt{\frac{\sum_t (G_t - x V_t)^2}{n (n - 1)}}

    In code: V_t is a step's variance trace and G_t its unbiased estimate of \|grad F\|^2, averaged apart over n steps
    and then divided; x is `inverse`, sigma_x `error`, n - 1 `freedom`. The error is that of a ratio of means, the
    jackknife over steps to first order. Of the two means only that of G may be near 0, so the division is by V.

    Given the weights, the noise of one step is independent of that of others, so the squared scatter of the steps over
    n is the variance of the mean's noise. Weights that move during a stretch add to the scatter, and so do batches
    drawn without replacement, whose noise cancels over an epoch: the error is then rather too large. It is too small
    where few steps have to show a heavy tail.

    Args:
        inverse: 1/B [1/examples].
        error: Standard error of `inverse`.
        freedom: Its degrees of freedom.

    Source: this project; averaging V and \|grad F\|^2 apart is McCandlish et al. (2018), arXiv 1812.06162, appendix A
        (verified in CerebrasResearch/nanoGNS, exact/ddpgns.py, which cites it).

    Example:
        >>> low, high = NoiseScale(inverse=0.01, error=0.002, freedom=60).interval()
        >>> round(low), round(high)
        (71, 167)
        >>> NoiseScale(inverse=0.001, error=0.002, freedom=60).is_known
        False
    """

    inverse: float
    error: float
    freedom: int

    @property
    def value(self) -> float:
        """B in examples; infinite where |grad F|^2 was found not to be positive."""
        return 1 / self.inverse if self.inverse > 0 else math.inf

    @property
    def is_known(self) -> bool:
        """Whether the upper end is finite: whether the gradient can be told from noise."""
        return math.isfinite(self.interval()[1])

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return the two ends between which B lies.

        Args:
            confidence: Of the interval, in (0, 1).

        Returns:
            Ends in examples. The upper one is infinite where |grad F|^2 cannot be told from 0, and the lower one too
            where it came out below 0 by more than chance explains.
        """
        reach = student_quantile((1 + confidence) / 2, self.freedom) * self.error
        ends = (self.inverse + reach, self.inverse - reach)
        low, high = (1 / end if end > 0 else math.inf for end in ends)
        return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Neighbouring measured steps of a run.

    Args:
        rows: Those steps, at least two.
        noise: Their noise scale.
    """

    rows: tuple[StepRow, ...]
    noise: NoiseScale

    @property
    def samples(self) -> tuple[int, int]:
        """Samples seen before the first of its steps and after the last."""
        return self.rows[0].samples_seen - self.rows[0].global_batch_size, self.rows[-1].samples_seen

    @property
    def loss(self) -> float | None:
        """Mean loss of its steps, None where the log has none."""
        losses = [row.loss for row in self.rows if row.loss is not None]
        return sum(losses) / len(losses) if losses else None


def measured_rows(run: Run) -> list[StepRow]:
    """Return the steps of a run whose V and s are there and finite."""
    numbers = [(row, row.variance_trace, row.grad_norm_sq) for row in run.steps]
    return [row for row, v, s in numbers if v is not None and s is not None and math.isfinite(v) and math.isfinite(s)]


def stretches(run: Run, most: int = STRETCHES, least_steps: int = LEAST_STEPS) -> list[Stretch]:
    """Cut a run into stretches of about equally many measured steps, with the noise scale of each.

    Args:
        run: The run.
        most: How many stretches at most.
        least_steps: Fewest measured steps of each, >= 2. Fewer means more points with larger errors.

    Returns:
        The stretches in order; none where the run holds fewer measured steps than that.
    """
    rows = measured_rows(run)
    count = min(most, len(rows) // least_steps)
    cuts = [len(rows) * place // count for place in range(count + 1)] if count else []
    size = run.start.get("dataset_size")
    dataset_size = size if isinstance(size, int) else None
    parts = (tuple(rows[first:last]) for first, last in pairwise(cuts))
    return [Stretch(rows=part, noise=noise_scale(part, dataset_size)) for part in parts]


def noise_scale(rows: Sequence[StepRow], dataset_size: int | None = None) -> NoiseScale:
    """Return the noise scale of some steps, the ratio of means with its error; `NoiseScale` has the equation.

    Args:
        rows: Measured steps, at least two, of any batch sizes.
        dataset_size: N, for `true_grad_norm_sq`.

    Returns:
        The noise scale; 0 with no error where V is 0 throughout.
    """
    n = len(rows)
    v = [row.variance_trace or 0.0 for row in rows]
    g = [true_grad_norm_sq(row, dataset_size) for row in rows]
    mean_v = sum(v) / n
    if mean_v <= 0:
        return NoiseScale(inverse=math.inf, error=0.0, freedom=n - 1)
    x = sum(g) / n / mean_v
    scatter = sum((g_t - x * v_t) ** 2 for g_t, v_t in zip(g, v, strict=True))
    return NoiseScale(inverse=x, error=math.sqrt(scatter / (n * (n - 1))) / mean_v, freedom=n - 1)


def true_grad_norm_sq(row: StepRow, dataset_size: int | None = None) -> float:
    r"""Return a step's unbiased estimate of the squared length of the whole data set's gradient.

    .. math:: G = s - V \left( \frac{1}{b} - \frac{1}{N} \right)

    In code: s is `grad_norm_sq`, V `variance_trace`, b the step's batch size, N `dataset_size`. The term in N is that
    of batches drawn without replacement; the log's ``noise_scale`` leaves it out, which matters for data sets that are
    not much larger than B. Examples of a batch are taken to weigh the same.

    Args:
        row: A measured step.
        dataset_size: N, None for data that do not run out.

    Returns:
        G [grad^2]; may be negative.

    Source: the factor (N - b)/N beside a V with b - 1 in its denominator is textbook survey sampling; derived and
        checked.
    """
    s, v = row.grad_norm_sq or 0.0, row.variance_trace or 0.0
    share = 1 / max(dataset_size, row.global_batch_size) if dataset_size else 0.0
    return s - v * (1 / row.global_batch_size - share)


def whole_noise_scale(parts: Sequence[Stretch], batch_size: int) -> NoiseScale:
    r"""Return the one noise scale that gives the same steps and samples as those of all stretches one after the other.

    .. math:: \frac{1}{1 + B/b} = u = \sum_j w_j u_j, \qquad u_j = \frac{1}{1 + B_j / b}

    In code: u_j is the share of the true gradient in the expected squared length of a batch's gradient in stretch j,
    w_j the stretch's share of the steps. A step at batch size b makes u_j of the progress that a step without noise
    would make (`adadagrad.report.tradeoff`), so shares are what adds up over a run whose noise scale changes; and u_j
    stays finite where B_j is not known. With a single stretch it is that stretch's.

    Args:
        parts: At least one stretch.
        batch_size: b, the constant batch of the run [examples].

    Returns:
        The noise scale, its error by propagation, sigma_u = b sigma_x (1 - u)^2.

    Source: this project.
    """
    total = sum(len(part.rows) for part in parts)
    share, square = 0.0, 0.0
    for part in parts:
        weight, noise = len(part.rows) / total, part.noise
        rest = 1 / (1 + noise.inverse * batch_size)  # 1 - u_j
        share += weight * (1 - rest)
        square += (weight * batch_size * noise.error * rest**2) ** 2
    rest = 1 - share
    freedom = sum(part.noise.freedom for part in parts)
    if rest <= 0:
        return NoiseScale(inverse=math.inf, error=0.0, freedom=freedom)
    error = math.sqrt(square) / (batch_size * rest**2)
    return NoiseScale(inverse=share / (batch_size * rest), error=error, freedom=freedom)
