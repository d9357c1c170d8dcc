"""The inner product tests: the error along the gradient, and the error across it."""

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
class InnerProductTest(AbstractPolicy):
    r"""Ask for the smallest batch whose gradient is a descent direction with high probability.

    .. math:: \frac{1}{b} \mathrm{Var}_i(\langle g_i, g \rangle) \le \theta^2 \|g\|^4
              \quad\Longrightarrow\quad T = \frac{V_p}{\theta^2 s^2}

    In code: V_p is `inner_product_variance` and s is `grad_norm_sq`, both of the whole gradient, not one layer.

    Use it where the norm test grows the batch faster than wanted: it looks at the noise along g only, which is a
    small part of the whole in many dimensions. By itself it does not limit the noise across g; the theory needs
    `AugmentedInnerProductTest` for that. Measuring V_p costs one inner product with g for each example, which
    needs the whole g first. Constant time and memory, given the statistics.

    Args:
        theta: Largest relative deviation along the gradient, > 0, dimensionless. Smaller asks for larger batches,
            as 1/theta^2. The default 0.9 is recalled from Bollapragada et al. (from memory, unverified (medium)).
        finite_population: As in `NormTest`.

    Raises:
        InvalidArgument: theta <= 0 or not finite; the finite population choice is unknown.

    Source: Lau, Liu, Kolar (2024), "AdAdaGrad", arXiv 2402.11215 (formula verified in timlautk/AdAdaGrad,
        tests.py); the test is that of Bollapragada, Byrd, Nocedal (2017), "Adaptive Sampling Strategies for
        Stochastic Optimization", arXiv 1710.11258 (number from memory, unverified (high)), eq. 2.6 (as cited by
        f-dangel/cockpit, inner_test.py).
    Differs from the paper: no. Its released code sums one variance for each layer, which loses the covariances
        between layers; here the variance is of the whole inner product, as defined.

    Example:
        >>> from adadagrad.core.records import GradientStatistics
        >>> stats = GradientStatistics(
        ...     num_examples=8, grad_norm_sq=4.0, variance_trace=9.0, inner_product_variance=32.0
        ... )
        >>> InnerProductTest(theta=0.5).required_batch_size(Observation(gradient=stats))
        8.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "inner_product_variance"})
    monotone: ClassVar[bool] = True

    theta: float = 0.9
    finite_population: FinitePopulation = "off"

    def __post_init__(self) -> None:
        check_positive(theta=self.theta)
        check_finite_population(self.finite_population)

    @property
    def threshold(self) -> float:
        """theta^2, which V_p / (b s^2) must not exceed."""
        return self.theta**2

    def required_batch_size(self, observation: Observation) -> float:
        """Return the batch size that the test asks for, in examples, neither rounded nor bounded."""
        s, vp = self.measured(observation, "grad_norm_sq", "inner_product_variance")
        requested = quotient(quotient(vp, s), self.theta**2 * s)
        return finite_population_size(requested, observation, self.finite_population)


@dataclass(frozen=True, slots=True)
class AugmentedInnerProductTest(AbstractPolicy):
    r"""Ask for the smallest batch that passes both the inner product test and the orthogonality test.

    .. math:: T = \max\left( \frac{V_p}{\theta^2 s^2},\; \frac{V_o}{\nu^2 s} \right), \qquad V_o = V - V_p / s

    In code: V_p is `inner_product_variance`, V_o `orthogonal_variance` (an exact identity, which costs nothing
    beyond V and V_p), s is `grad_norm_sq`.

    Use it instead of the norm test where a smaller batch is enough as long as the direction is right: it allows
    much noise across g (nu) and little along g (theta). With theta^2 + nu^2 = eta^2 it has the norm test's rate.
    Constant time and memory, given the statistics, which cost what those of `InnerProductTest` cost.

    Args:
        theta: Largest relative deviation along the gradient, > 0, dimensionless. Smaller asks for larger batches.
        nu: Largest relative deviation across the gradient, > 0, dimensionless. Smaller asks for larger batches.
            The defaults 0.9 and 5.84 are recalled from Bollapragada et al. (from memory, unverified (medium); nu
            is recalled as the tangent of 80 degrees, which is 5.67).
        finite_population: As in `NormTest`.

    Raises:
        InvalidArgument: theta or nu <= 0 or not finite; the finite population choice is unknown.

    Source: Lau, Liu, Kolar (2024), "AdAdaGrad", arXiv 2402.11215 (formula verified in timlautk/AdAdaGrad,
        tests.py); Bollapragada, Byrd, Nocedal (2017), arXiv 1710.11258 (number from memory, unverified (high)),
        eq. 2.6 and 3.3 (as cited by f-dangel/cockpit, inner_test.py and ortho_test.py).
    Differs from the paper: no. Its released code removes one direction for each layer from g_i; here it is the one
        direction of the whole gradient, as defined.

    Example:
        >>> from adadagrad.core.records import GradientStatistics
        >>> stats = GradientStatistics(
        ...     num_examples=8, grad_norm_sq=4.0, variance_trace=9.0, inner_product_variance=4.0
        ... )
        >>> AugmentedInnerProductTest(theta=0.5, nu=1.0).required_batch_size(Observation(gradient=stats))
        2.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace", "inner_product_variance"})
    monotone: ClassVar[bool] = True

    theta: float = 0.9
    nu: float = 5.84
    finite_population: FinitePopulation = "off"

    def __post_init__(self) -> None:
        check_positive(theta=self.theta, nu=self.nu)
        check_finite_population(self.finite_population)

    @property
    def threshold(self) -> float:
        """1, which the larger of the two relative variances, each over its own threshold, must not exceed."""
        return 1.0

    def required_batch_size(self, observation: Observation) -> float:
        """Return the batch size that both tests ask for, in examples, neither rounded nor bounded."""
        s, v, vp = self.measured(observation, "grad_norm_sq", "variance_trace", "inner_product_variance")
        along = quotient(quotient(vp, s), self.theta**2 * s)
        across = quotient(v - quotient(vp, s), self.nu**2 * s)
        requested = max(across, along)  # in this order, because max keeps a NaN only where it comes first
        return finite_population_size(requested, observation, self.finite_population)
