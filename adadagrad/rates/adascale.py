"""AdaScale: the learning rate of SGD grows by what the larger batch is measured to be worth."""

from __future__ import annotations

from dataclasses import dataclass

from adadagrad.core.protocols import RateState
from adadagrad.core.step_scale import StepScale
from adadagrad.rates.gain import AbstractGainRate, ProgressIn


@dataclass(frozen=True, slots=True)
class AdaScale(AbstractGainRate):
    r"""Multiply the learning rate by the gain, so that a step does what that many base steps would have done.

    .. math:: r_t = \frac{\sigma_t^2 + \mu_t^2}{\sigma_t^2 / s + \mu_t^2}, \qquad
              w_{t+1} = w_t - r_t \, lr(\tau_t) \, g_t, \qquad \tau_{t+1} = \tau_t + r_t

    In code: sigma^2 is V / b_0, V the `variance_trace` and b_0 the base batch; mu^2 is `true_grad_norm_sq`; s is
    `StepScale.scale`, b / b_0, whole or not; b_0 tau is the run's progress [examples].

    Use it with SGD, with or without momentum, whose coefficient stays as it is at every s. r lies between 1 and s: s
    where noise dominates (`LinearScaling`), 1 where a larger batch no longer helps, and exactly 1 at s = 1. It promises
    the same bound on the expected loss after the same progress tau, at every s, for smooth functions under the
    Polyak-Lojasiewicz condition at a constant learning rate lr in (0, 2/L), L the largest curvature.
    Schedules and `total_samples` are read in progress: at the base batch that is examples seen, and a larger batch
    sees s / r times as many for it. It needs the statistics of many steps, or the gain is late: stale ones after a
    change of the batch cost accuracy. For optimizers that divide by an average of squared gradients there are
    `AdamScale` and `AccumulatorScale`. Costs the measurements (`Measure`), else constant time and memory.

    Args:
        base_batch_size: b_0, for which the optimizer's learning rate was chosen, >= 1 [examples]. Smaller gives
            larger factors. None is the first batch size of the run.
        smoothing: Weight of the past in the averages of sigma^2 and mu^2, between 0 and 1, dimensionless. Smaller
            follows faster and is noisier. None is the paper's max(1 - s / 1000, 0).
        progress_in: ``"scale_invariant"``, the gain times b_0, as in the paper; or ``"samples"``, examples seen, which
            ends the run earlier at the same schedule.

    Raises:
        InvalidArgument: base_batch_size is not an integer >= 1, smoothing does not lie between 0 and 1, or progress_in
            is unknown.

    Source: Johnson, Agrawal, Gu, Guestrin (2020), "AdaScale SGD: A User-Friendly Algorithm for Distributed Training",
        arXiv 2007.05105 (verified in the full text of the submission of 2020; estimators verified in
        facebookresearch/fairscale, adascale.py at 146f160, and petuum/adaptdl at 542e123).
    Differs from the paper: V comes from any estimator, per example too, and so is known at s = 1; r_0 = 1 holds only
        until something has been measured, and the statistics of a step are in its own gain; the averages advance with
        measured steps only, and where s falls, the plain mean they began with is not taken up again. As in the paper,
        and unlike fairscale, one gain for the whole model. The floor of sigma^2, 1e-6 [grad^2], is the paper's.

    Example:
        >>> from adadagrad.core.records import GradientStatistics
        >>> rule, step = AdaScale(), StepScale(global_batch_size=16, base_batch_size=4)
        >>> noisy = GradientStatistics(num_examples=16, grad_norm_sq=1.75, variance_trace=12.0)  # sigma^2 = 3, mu^2 = 1
        >>> state = rule.observe(rule.start(), noisy, step)
        >>> round(rule.factor(state, step), 4), round(rule.progress(state, step), 4)  # 4 / (3/4 + 1), times 4 examples
        (2.2857, 9.1429)
    """

    base_batch_size: int | None = None
    smoothing: float | None = None
    progress_in: ProgressIn = "scale_invariant"

    def factor(self, state: RateState, step: StepScale) -> float:
        """Return the gain."""
        return self.gain(state, step)
