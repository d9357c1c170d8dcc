"""A gain rule for adaptive optimizers that follows what their accumulator remembers of smaller batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adadagrad.core.checks import check_fraction
from adadagrad.core.protocols import RateState
from adadagrad.core.step_scale import StepScale
from adadagrad.rates.gain import AbstractGainRate, ProgressIn


@dataclass(frozen=True, slots=True)
class AccumulatorScale(AbstractGainRate):
    r"""Give an optimizer that divides by sqrt(v) the steps it would take had the same progress been made in base steps.

    .. math:: f = r \sqrt{v / v_0}, \qquad q = \sigma^2 / s + \mu^2, \quad q_0 = \sigma^2 + \mu^2, \quad r = q_0 / q

    .. math:: m = 1: \; v \mathrel{+}= q, \; v_0 \mathrel{+}= r q_0; \qquad
              m < 1: \; v \leftarrow m v + (1 - m) q, \; v_0 \leftarrow m^r v_0 + (1 - m^r) q_0

    In code: r, sigma^2, mu^2 and s as for `AdaScale`; m is `memory`; q and q_0 are the expected squared norms of the
    step's gradient and of a base batch's, v (`accumulated`) what the optimizer's accumulator has become, and v_0
    (`accumulated_base`) what it would be after the same progress at the base batch. With m < 1 both are divided by the
    weight they hold, as Adam does. A step's factor has the step itself in v and v_0, as the optimizer's division does.

    Use it where the batch changes *during* training with AdaGrad, Adam, AdamW or RMSprop. Special cases, for m < 1
    unless said otherwise:

    - a constant batch from the first step on: sqrt(r), `AdamScale`; with m = 1 it is 1, AdaGrad's sum does the scaling;
    - m = 0: sqrt(r) at every step;
    - a batch that grows late: r at first, as `AdaScale`, since v still holds the past; sqrt(r) after about 1 / (1 - m)
      steps. With m = 1 it stays near r until the new steps outweigh the past;
    - a batch that shrinks back: below 1, since v holds fewer, or smaller, squares than base steps would have left.

    f is held at or below max(1, s): where gradients shrink fast, v forgets more slowly than v_0, and the formula would
    go beyond linear scaling for a reason that has nothing to do with noise. It knows two scalars, not the optimizer's
    own accumulator: all coordinates are treated alike, and an optimizer that was trained before, or is reset, is
    taken for a new one. Progress and cost are as for `AdaScale`.

    Args:
        memory: m, from 0 to 1, dimensionless: 1 for a sum (AdaGrad, AdaGradNorm), beta_2 for Adam and AdamW, alpha for
            RMSprop. Smaller forgets earlier batches sooner.
        base_batch_size: As for `AdaScale`.
        smoothing: As for `AdaScale`.
        progress_in: As for `AdaScale`.

    Raises:
        InvalidArgument: memory lies outside [0, 1], or an argument is one that `AdaScale` refuses.

    Source: this project, derived from the gain of AdaScale, arXiv 2007.05105; no better than
        linear scaling where both were tried, and worse on a small GPT (LOG.md).
    Differs: AdaScale leaves the optimizer's denominator out of account. Steps applied before the first measurement
        enter neither v nor v_0; later ones that are not measured enter with the averages.

    Example:
        >>> from adadagrad.core.records import GradientStatistics
        >>> rule, base = AccumulatorScale(memory=0.5), StepScale(global_batch_size=4, base_batch_size=4)
        >>> noisy = GradientStatistics(num_examples=4, grad_norm_sq=2.0, variance_trace=8.0)  # sigma^2 = 2, mu^2 = 0
        >>> state = rule.observe(rule.start(), noisy, base)
        >>> for _ in range(20):
        ...     state = rule.advance(state, base)
        >>> grown, factors = StepScale(global_batch_size=16, base_batch_size=4), []
        >>> for _ in range(20):
        ...     factors.append(round(rule.factor(state, grown), 2))
        ...     state = rule.advance(state, grown)
        >>> factors[:4], factors[-1]  # from s = 4 towards its square root
        ([3.16, 2.65, 2.35, 2.18], 2.0)
    """

    memory: float
    base_batch_size: int | None = None
    smoothing: float | None = None
    progress_in: ProgressIn = "scale_invariant"

    def __post_init__(self) -> None:
        AbstractGainRate.__post_init__(self)
        check_fraction(memory=self.memory)

    def start(self) -> RateState:
        """Return empty averages and accumulators."""
        empty = {"accumulated": 0.0, "accumulated_base": 0.0, "weight": 0.0, "weight_base": 0.0}
        return {**AbstractGainRate.start(self), **empty}

    def factor(self, state: RateState, step: StepScale) -> float:
        """Return r sqrt(v / v_0), with the step in both; 1 where nothing has been measured yet."""
        if not state["measurements"]:
            return 1.0
        after = self.advance(state, step)
        v = after["accumulated"] / after["weight"]
        v_base = after["accumulated_base"] / after["weight_base"]
        return min(self.gain(state, step) * math.sqrt(v / v_base), max(1.0, step.scale))

    def advance(self, state: RateState, step: StepScale) -> RateState:
        """Return the state with a step in its accumulators; unchanged where nothing has been measured yet."""
        if not state["measurements"]:
            return state
        square = state["variance"] / step.scale + state["norm_sq"]
        square_base = state["variance"] + state["norm_sq"]
        v, weight = self._add(state["accumulated"], state["weight"], square, steps=1.0)
        v_base, weight_base = self._add(
            state["accumulated_base"], state["weight_base"], square_base, steps=self.gain(state, step)
        )
        return {
            **state,
            "accumulated": v,
            "accumulated_base": v_base,
            "weight": weight,
            "weight_base": weight_base,
        }

    def _add(self, accumulated: float, weight: float, square: float, steps: float) -> tuple[float, float]:
        """Return an accumulator and its weight after a number of steps, not always whole, of the same square."""
        if self.memory == 1:
            return accumulated + steps * square, 1.0
        new = -math.expm1(steps * math.log(self.memory)) if self.memory else 1.0  # 1 - m^steps, also for m near 1
        return (1 - new) * accumulated + new * square, (1 - new) * weight + new
