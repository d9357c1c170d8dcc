"""Rules that know the batch size and nothing else: the learning rate grows with it, or with its square root."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adadagrad.core.checks import check_integer
from adadagrad.core.protocols import RateState
from adadagrad.core.step_scale import StepScale
from adadagrad.rates.base import AbstractRate


@dataclass(frozen=True, slots=True)
class LinearScaling(AbstractRate):
    r"""Multiply the learning rate by the scale, so that each example moves the parameters as far as before.

    .. math:: f = s = b / b_0

    In code: s is `StepScale.scale`, b the step's batch and b_0 the base batch, both in examples.

    Use it with SGD, with a warm-up, while noise dominates the gradient. It breaks where noise no longer does, and
    where f lr L reaches 2, L the largest curvature: on a quadratic the error around the minimum grows by the factor
    (2 - lr L) / (2 - s lr L), and beyond that the run diverges. `AdaScale` measures how far it is right. Costs nothing.

    Args:
        base_batch_size: b_0, for which the optimizer's learning rate was chosen, >= 1 [examples]. Smaller gives
            larger factors. None is the first batch size of the run.

    Raises:
        InvalidArgument: base_batch_size is not an integer >= 1.

    Source: Goyal et al. (2017), "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv 1706.02677
        (from memory, unverified (high)); the growing error is from the analysis of AdaScale, arXiv 2007.05105
        (verified in the submission of 2020).
    Differs: no.

    Example:
        >>> rule = LinearScaling(base_batch_size=64)
        >>> rule.factor(rule.start(), StepScale(global_batch_size=256, base_batch_size=64))
        4.0
    """

    base_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.base_batch_size is not None:
            check_integer(1, base_batch_size=self.base_batch_size)

    def factor(self, state: RateState, step: StepScale) -> float:
        """Return s, which does not depend on the state."""
        return step.scale


@dataclass(frozen=True, slots=True)
class SquareRootScaling(AbstractRate):
    r"""Multiply the learning rate by the square root of the scale, as suits optimizers that divide by the noise.

    .. math:: f = \sqrt{s} = \sqrt{b / b_0}

    In code: the letters of `LinearScaling`.

    Use it with Adam, AdamW and RMSprop while noise dominates the gradient: there the division already makes a step
    sqrt(s) times longer in the direction that all examples share. With AdaGrad at a constant batch its sum does all
    of the scaling, so this rule is sqrt(s) too much; `AccumulatorScale` tells the cases apart. Like `LinearScaling`
    it breaks where noise no longer dominates. Costs nothing.

    Args:
        base_batch_size: As for `LinearScaling`.

    Raises:
        InvalidArgument: base_batch_size is not an integer >= 1.

    Source: Krizhevsky (2014), "One weird trick for parallelizing convolutional neural networks", arXiv 1404.5997
        (from memory, unverified (high)); OLMo-core applies it when the batch changes, for Adam alone (verified).
    Differs: OLMo-core refuses other optimizers; here the choice is the user's.

    Example:
        >>> rule = SquareRootScaling(base_batch_size=64)
        >>> rule.factor(rule.start(), StepScale(global_batch_size=256, base_batch_size=64))
        2.0
    """

    base_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.base_batch_size is not None:
            check_integer(1, base_batch_size=self.base_batch_size)

    def factor(self, state: RateState, step: StepScale) -> float:
        """Return sqrt(s), which does not depend on the state."""
        return math.sqrt(step.scale)
