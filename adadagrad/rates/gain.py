r"""The gain of a larger batch, measured: how many base steps one step is worth. Shared by the rules that use it.

Letters used below: b_0 the base batch and b the step's batch [examples], s = b / b_0, sigma^2 the variance of the
gradient of a *base* batch and mu^2 = \|grad F\|^2 [both grad^2].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Literal

from adadagrad.core.checks import check_choice, check_integer, check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import RateState
from adadagrad.core.records import GradientStatistics
from adadagrad.core.step_scale import StepScale
from adadagrad.rates.base import AbstractRate

ProgressIn = Literal["scale_invariant", "samples"]
"""What schedules and the end of training read: gains in units of the base batch, or examples seen."""

SMALLEST_VARIANCE = 1e-6
"""Below this a measured sigma^2 is raised to it [grad^2, absolute: a model of tiny gradients counts as noisier]."""

LARGEST = 1e100
"""Above this a measurement is no more used than a non-finite one [grad^2]: sums of it would overflow."""


def gain(variance: float, norm_sq: float, scale: float) -> float:
    r"""Return how many base steps a step of s base batches is worth.

    .. math:: r = \frac{\sigma^2 + \mu^2}{\sigma^2 / s + \mu^2}

    In code: sigma^2 is `variance`, mu^2 `norm_sq`, s `scale`. It is s where noise dominates and 1 where there is none.

    Args:
        variance: Variance of the gradient of a base batch, tr Sigma / b_0 [grad^2]; below 0 counts as 0.
        norm_sq: Squared norm of the true gradient [grad^2]; below 0 counts as 0.
        scale: s, > 0.

    Returns:
        A number between 1 and s; below s = 1 between s and 1. Without evidence, that is where either is NaN or both
        are 0 or both infinite, it is 1.

    Raises:
        InvalidArgument: scale is not a finite number above 0.

    Example:
        >>> gain(3.0, 1.0, scale=1), gain(3.0, 1.0, scale=2), gain(3.0, 0.0, scale=2), gain(0.0, 1.0, scale=2)
        (1.0, 1.6, 2.0, 1.0)
    """
    check_positive(scale=scale)
    noise, signal = max(variance, 0.0), max(norm_sq, 0.0)
    largest = max(noise, signal)
    if math.isnan(variance) or math.isnan(norm_sq) or largest == 0 or noise == signal == math.inf:
        return 1.0
    noise, signal = (1.0 if part == largest else part / largest for part in (noise, signal))  # sums cannot overflow
    low, high = min(1.0, scale), max(1.0, scale)
    return float(min(max((noise + signal) / (noise / scale + signal), low), high))


def average(state: RateState, variance: float, norm_sq: float, decay: float) -> RateState:
    """Put one measurement into both running means: plain ones at first, then exponential ones.

    A new value has the weight 1/t while t, the number of measurements, is below 1/(1 - decay), then 1 - decay.

    Args:
        state: Holds `measurements`, `variance` and `norm_sq`; whatever else it holds is kept.
        variance: A new sigma^2 [grad^2].
        norm_sq: A new mu^2 [grad^2].
        decay: Weight of the past, from 0 to 1.

    Returns:
        The new state.
    """
    measurements = state["measurements"] + 1
    weight = max(1 / measurements, 1 - decay)
    return {
        **state,
        "measurements": measurements,
        "variance": (1 - weight) * state["variance"] + weight * variance,
        "norm_sq": (1 - weight) * state["norm_sq"] + weight * norm_sq,
    }


class AbstractGainRate(AbstractRate):
    """A rule that follows the gain: its fields, its averages, and its progress.

    Each measured step gives sigma^2 = V / b_0, raised to at least `SMALLEST_VARIANCE`, and mu^2 = `true_grad_norm_sq`,
    raised to at least 0; `average` smooths each by itself. One that is not finite, or above `LARGEST`, is ignored.

    Raises:
        InvalidArgument: base_batch_size is not an integer >= 1, smoothing is not between 0 and 1, or progress_in is
            unknown.
    """

    __slots__ = ()

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})

    @property
    @abstractmethod
    def smoothing(self) -> float | None:
        """Weight of the past in the averages, between 0 and 1; None is max(1 - s / 1000, 0)."""

    @property
    @abstractmethod
    def progress_in(self) -> ProgressIn:
        """Whether a step counts as its gain in base batches, or as its examples."""

    def __post_init__(self) -> None:
        if self.base_batch_size is not None:
            check_integer(1, base_batch_size=self.base_batch_size)
        if self.smoothing is not None:
            check_positive(smoothing=self.smoothing)
            if self.smoothing >= 1:
                raise InvalidArgument(f"smoothing must be < 1, got {self.smoothing}: 1 would never forget")
        check_choice("progress_in", self.progress_in, ("scale_invariant", "samples"))

    @property
    def counts_progress(self) -> bool:
        """True unless `progress_in` is ``"samples"``."""
        return self.progress_in == "scale_invariant"

    def start(self) -> RateState:
        """Return empty averages."""
        return {"measurements": 0.0, "variance": 0.0, "norm_sq": 0.0}

    def observe(self, state: RateState, statistics: GradientStatistics, step: StepScale) -> RateState:
        """Return the state with a measurement in its averages."""
        variance = statistics.variance_trace / step.base_batch_size
        norm_sq = statistics.true_grad_norm_sq
        if not (abs(variance) <= LARGEST and abs(norm_sq) <= LARGEST):  # NaN too
            return state
        decay = max(1 - step.scale / 1000, 0.0) if self.smoothing is None else self.smoothing
        return average(state, max(variance, SMALLEST_VARIANCE), max(norm_sq, 0.0), decay)

    def gain(self, state: RateState, step: StepScale) -> float:
        """Return how many base steps a step is worth, between 1 and s; 1 where nothing has been measured yet."""
        return gain(state["variance"], state["norm_sq"], step.scale)

    def progress(self, state: RateState, step: StepScale) -> float:
        """Return the gain times b_0, or the examples of the step, as `progress_in` says [examples]."""
        if self.counts_progress:
            return self.gain(state, step) * step.base_batch_size
        return float(step.global_batch_size)
