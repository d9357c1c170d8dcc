"""Big Batch SGD: add examples to the batch for as long as noise outweighs the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adadagrad.core.checks import check_integer, check_positive
from adadagrad.core.records import Observation, quotient
from adadagrad.policies.base import AbstractPolicy


@dataclass(frozen=True, slots=True)
class BigBatch(AbstractPolicy):
    r"""Ask for a fixed number of examples more, at each step whose gradient fails the norm test.

    .. math:: \frac{V}{b} > \eta^2 s \quad\Longrightarrow\quad b \leftarrow b + \Delta

    In code: V is `variance_trace`, s is `grad_norm_sq`, b the examples of the step, Delta `increment`.

    Use it where the jumps of `NormTest` are too large: the batch grows in small, equal steps. eta = 1 asks that the
    gradient be no shorter than its error. In pure noise s is V/b on average, so that about half of all steps pass then,
    and the batch grows by Delta/2 a step; `NormTest` with eta = 1 would hardly move. A run that measures seldom grows
    seldom: with an increment far below b it may stay behind. Zero noise holds, a zero gradient grows. Constant time and
    memory, given the statistics.

    Args:
        increment: Delta, >= 1 [examples]. Smaller grows more slowly.
        eta: Largest relative error of the gradient, > 0, dimensionless. Smaller grows earlier and further.

    Raises:
        InvalidArgument: increment is not an integer >= 1; eta <= 0 or not finite.

    Source: De, Yadav, Jacobs, Goldstein (2017), "Big Batch SGD: Automated Inference using Adaptive Batch Sizes", arXiv
        1610.05792, with eta = 1 (from memory, unverified (high)). The paper's increment was not verified, so there is
        no default.
    Differs from the paper: the batch grows once in a step and for the next one, where the paper repeats the test within
        an iteration until it passes. eta is our extension.

    Example:
        >>> from adadagrad.core.records import GradientStatistics
        >>> stats = GradientStatistics(num_examples=8, grad_norm_sq=1.0, variance_trace=9.0)
        >>> BigBatch(increment=4).required_batch_size(Observation(gradient=stats, global_batch_size=8))  # 9/8 > 1
        12.0
        >>> BigBatch(increment=4).required_batch_size(Observation(gradient=stats, global_batch_size=16))
        16.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})
    monotone: ClassVar[bool] = True

    increment: int
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_integer(1, increment=self.increment)
        check_positive(eta=self.eta)

    def required_batch_size(self, observation: Observation) -> float:
        """Return the present size, or `increment` more; NaN where the two sides cannot be compared.

        Args:
            observation: Without a `global_batch_size`, the examples of the record are those of the step.

        Returns:
            The batch size [examples].
        """
        s, v, n = self.measured(observation, "grad_norm_sq", "variance_trace", "num_examples")
        b = n if observation.global_batch_size is None else observation.global_batch_size
        excess = quotient(v, self.eta**2 * s * b)
        if math.isnan(excess):
            return math.nan
        return float(b + self.increment if excess > 1 else b)
