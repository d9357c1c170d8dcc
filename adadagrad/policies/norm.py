"""The norm test: the error of the batch gradient, compared with its length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adadagrad.core.checks import check_positive
from adadagrad.core.records import Observation, quotient
from adadagrad.policies.base import AbstractPolicy
from adadagrad.policies.finite_population import (
    FinitePopulation,
    check_finite_population,
    finite_population_size,
)


@dataclass(frozen=True, slots=True)
class NormTest(AbstractPolicy):
    r"""Ask for the smallest batch whose gradient is, in relative mean square, within eta of the full gradient.

    .. math:: \frac{1}{b} \frac{1}{b-1} \sum_i \|g_i - g\|^2 \le \eta^2 \|g\|^2
              \quad\Longrightarrow\quad T = \frac{V}{\eta^2 s}

    In code: V is `variance_trace`, s is `grad_norm_sq`, over all parameters jointly.

    Use it first: it is the cheapest test, needing per-example gradient norms only. Where noise dominates, one test
    asks for at most about b / eta^2 in expectation, so eta = 0.1 can grow the batch a hundredfold at once
    (`Bounds.max_growth` limits that), and eta >= 1 does not grow it at all except by chance. Heavy tails make V,
    and so the request, noisy. The convergence guarantee is for the exact test with the full gradient; this
    implementable form is a heuristic. Constant time and memory, given the statistics.

    Args:
        eta: Largest relative error of the gradient, > 0, dimensionless, in (0, 1) by the theory. Smaller asks for
            larger batches, as 1/eta^2.
        finite_population: ``"off"``, ``"current"`` (published factor (N - b)/(N - 1) at the current b) or
            ``"solved"`` (our extension), for sampling without replacement; see
            `adadagrad.policies.finite_population`.

    Raises:
        InvalidArgument: eta <= 0 or not finite; the finite population choice is unknown.

    Source: Lau, Liu, Kolar (2024), "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods",
        arXiv 2402.11215 (formula verified in timlautk/AdAdaGrad, tests.py); the test is that of Byrd, Chin,
        Nocedal, Wu (2012), eq. 3.9 (verified in f-dangel/cockpit, norm_test.py).
    Differs from the paper: no; the finite-population factor, which its code omits, is off by default.

    Example:
        >>> from adadagrad.core.records import GradientStatistics
        >>> stats = GradientStatistics(num_examples=8, grad_norm_sq=4.0, variance_trace=9.0)
        >>> NormTest(eta=0.5).required_batch_size(Observation(gradient=stats))
        9.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})
    monotone: ClassVar[bool] = True

    eta: float = 0.25
    finite_population: FinitePopulation = "off"

    def __post_init__(self) -> None:
        check_positive(eta=self.eta)
        check_finite_population(self.finite_population)

    @property
    def threshold(self) -> float:
        """eta^2, which V / (b s) must not exceed."""
        return self.eta**2

    def required_batch_size(self, observation: Observation) -> float:
        """Return the batch size that the test asks for, in examples, neither rounded nor bounded."""
        s, v = self.measured(observation, "grad_norm_sq", "variance_trace")
        return finite_population_size(quotient(v, self.eta**2 * s), observation, self.finite_population)
