"""AdamScale: the square root of AdaScale's gain, for optimizers that divide by the size of recent gradients."""

from __future__ import annotations

from dataclasses import dataclass

from adadagrad.core.checks import check_fraction
from adadagrad.core.protocols import RateState
from adadagrad.core.step_scale import StepScale
from adadagrad.rates.gain import AbstractGainRate, ProgressIn


@dataclass(frozen=True, slots=True)
class AdamScale(AbstractGainRate):
    r"""Multiply the learning rate by the square root of the gain.

    .. math:: f_t = r_t^{p}, \qquad \tau_{t+1} = \tau_t + r_t

    In code: r is the gain of `AdaScale`, between 1 and s = b / b_0; p is `power`; b_0 tau is the run's progress.

    Use it with Adam, AdamW and RMSprop: their squared gradients shrink by 1 / r when the batch grows, so that the
    division already makes a step sqrt(r) times longer in the direction that all examples share, and sqrt(r) is missing
    to the r that the step is worth. That is so once the optimizer's average has forgotten the smaller batch;
    `AccumulatorScale` covers the time before, and AdaGrad. Progress, cost and what breaks it are as for `AdaScale`.

    Args:
        base_batch_size: As for `AdaScale`.
        smoothing: As for `AdaScale`.
        power: p, between 0 and 1, dimensionless. Smaller is more careful; 1 is `AdaScale`, 0 leaves the learning rate
            alone and only counts progress.
        progress_in: As for `AdaScale`.

    Raises:
        InvalidArgument: power lies outside [0, 1], or an argument is one that `AdaScale` refuses.

    Source: petuum/adaptdl, scaling_rules.py at 542e123, AdamScale (verified).
    Differs: statistics are of the raw gradient, where adaptdl divides gradients by (sqrt(v) + eps) before it takes
        norms; they are averaged as in the paper of AdaScale. A change of the batch leaves the optimizer's moments
        alone, where adaptdl wipes them.

    Example:
        >>> from adadagrad.core.records import GradientStatistics
        >>> rule, step = AdamScale(), StepScale(global_batch_size=16, base_batch_size=4)
        >>> noisy = GradientStatistics(num_examples=16, grad_norm_sq=0.75, variance_trace=12.0)  # sigma^2 = 3, mu^2 = 0
        >>> state = rule.observe(rule.start(), noisy, step)
        >>> rule.factor(state, step), rule.progress(state, step)
        (2.0, 16.0)
    """

    base_batch_size: int | None = None
    smoothing: float | None = None
    power: float = 0.5
    progress_in: ProgressIn = "scale_invariant"

    def __post_init__(self) -> None:
        AbstractGainRate.__post_init__(self)
        check_fraction(power=self.power)

    def factor(self, state: RateState, step: StepScale) -> float:
        """Return the gain to the power p."""
        return float(self.gain(state, step) ** self.power)
