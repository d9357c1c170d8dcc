r"""From sums over measured units to `GradientStatistics`: the closed forms, written once.

Letters: unit i enters the gradient with weight c_i; C = sum c_i over the measured units, w_i = c_i / C,
G = sum c_i g_i over the measured units, g the final mean gradient of the whole step. Then

    V  = (sum w_i |g_i|^2 - |G/C|^2) / (1 - sum w_i^2)            unbiased, tr Sigma
    Vp = (sum w_i p_i^2 - (sum w_i p_i)^2) / (1 - sum w_i^2)      p_i = <g_i, g>

For equal weights these are the sample variances with n - 1. With every example measured G/C = g, and they are
the formulas of the definition. Rounding can leave V slightly below zero; it is clamped there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from adadagrad.core.comm import ALONE, Ranks
from adadagrad.statistics.along import AlongGradient, along_gradient


@dataclass(slots=True)
class WeightedSums:
    """Sums over the measured units of one step; every unit is added once.

    Args:
        weight: C = sum c_i.
        weight_sq: sum c_i^2.
        squares: sum c_i |g_i|^2.
        squares_sq: sum c_i |g_i|^4, for the standard error of V.
        units: Number of units.
        products: c_i and p_i of every unit, kept as tensors (n,) until Vp is formed.
        unit_squares: |g_i|^2 beside the products, where p_i is known; the error of V then needs no approximation.
        ranks: The processes whose units are added up.
        along: Where they are several, the sums over all of them that take products.
    """

    weight: float = 0.0
    weight_sq: float = 0.0
    squares: float = 0.0
    squares_sq: float = 0.0
    units: int = 0
    products: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    unit_squares: list[Tensor] = field(default_factory=list)
    ranks: Ranks = ALONE
    along: AlongGradient | None = None

    def add(self, coefficients: Tensor, unit_squares: Tensor) -> None:
        """Add units.

        Args:
            coefficients: c_i, float64 (n,); zero-weight rows are not units and are left out.
            unit_squares: |g_i|^2, float64 (n,).
        """
        weighted = coefficients * unit_squares
        rows = (coefficients, coefficients.square(), weighted, weighted * unit_squares, (coefficients != 0).double())
        weight, weight_sq, squares, squares_sq, units = torch.stack(rows).sum(1).tolist()  # one wait for the device
        self.weight += weight
        self.weight_sq += weight_sq
        self.squares += squares
        self.squares_sq += squares_sq
        self.units += int(units)

    def add_equal(self, coefficient: float, squares: Tensor) -> None:
        """Add units of equal weight, in a few operations.

        Args:
            coefficient: c, of every unit; units of weight 0 are left out.
            squares: |c g_i|^2, float64 (n,).
        """
        if coefficient == 0:
            return
        n, c = len(squares), coefficient
        total, total_sq = squares.sum().item(), torch.dot(squares, squares).item()
        self.weight += n * c
        self.weight_sq += n * c * c
        self.squares += total / c
        self.squares_sq += total_sq / c**3
        self.units += n

    def add_squares(self, coefficients: Tensor, squares: Tensor) -> None:
        """Add units from the squares of their weighted gradients.

        Args:
            coefficients: c_i, float64 (n,); zero-weight rows are not units and are left out.
            squares: |c_i g_i|^2, float64 (n,).
        """
        rows = coefficients != 0
        if not bool(rows.all()):
            coefficients, squares = coefficients[rows], squares[rows]
        self.add(coefficients, squares / coefficients.square())

    def scaled(self, factor: float) -> WeightedSums:
        """Return the sums for weights f c_i; the units' own gradients stay what they are."""
        f, products = factor, [(factor * c, p) for c, p in self.products]
        squares, squares_sq = f * self.squares, f * self.squares_sq
        weight, weight_sq = f * self.weight, f * f * self.weight_sq
        return WeightedSums(weight, weight_sq, squares, squares_sq, self.units, products, self.unit_squares, self.ranks)

    def over_ranks(self, grad_norm_sq: float | None = None) -> WeightedSums:
        """Return the sums over the units of all ranks, after one message of 40 bytes, or of 64 with products.

        Args:
            grad_norm_sq: s of the whole step's gradient, where products with it are kept; None for none. Then
                |g_i - g|^4 takes the place of |g_i|^4 in the message.
        """
        own = (self.weight, self.weight_sq, self.squares, float(self.units))
        if grad_norm_sq is None or self.ranks.count == 1:
            weight, weight_sq, squares, units, squares_sq = self.ranks.sum(*own, self.squares_sq)
            along = None
        else:
            a = along_gradient(self.products, self.unit_squares, grad_norm_sq)
            weight, weight_sq, squares, units, total, size, spread, distances_sq = self.ranks.sum(
                *own, a.total, a.size, a.spread, a.distances_sq
            )
            along = replace(a, total=total, size=size, spread=spread, distances_sq=distances_sq)
            squares_sq = math.nan  # not read where there are products
        kept = (self.products, self.unit_squares, self.ranks, along)
        return WeightedSums(weight, weight_sq, squares, squares_sq, int(units), *kept)

    @property
    def freedom(self) -> float:
        """1 - sum w_i^2, the correction that makes a weighted variance unbiased; 0 for a single unit."""
        if self.units < 2:
            return 0.0
        return 1 - self.weight_sq / self.weight**2

    def variance_trace(self, group_norm_sq: float) -> float:
        """Return V for the norm |G|^2 of the measured units' summed gradient; NaN for fewer than two units."""
        if self.freedom <= 0:
            return math.nan
        mean_square = self.squares / self.weight
        variance = (mean_square - group_norm_sq / self.weight**2) / self.freedom
        return variance if math.isnan(variance) else max(variance, 0.0)

    def variance_trace_error(self, grad_norm_sq: float | None = None, scale: float = 1.0) -> float | None:
        r"""Return the standard error of V from the spread of |g_i - g|^2; None for fewer than three units.

        With units that are independent, e_i = g_i - E g, and weights that do not depend on them,

        .. math:: V - \mathrm{tr} \Sigma \approx \sum_i w_i (|e_i|^2 - \mathrm{tr} \Sigma)
                  - \sum_{i \ne j} w_i w_j \langle e_i, e_j \rangle, \qquad
                  \mathrm{Var}\, V \approx \frac{\mathrm{Var} |e_i|^2 \sum_i w_i^2}{1 - \sum_i w_i^2}

        The first sum alone gives Var |e_i|^2 sum w_i^2; dividing by 1 - sum w_i^2 makes up for the second one:
        exactly for Gaussian units of equal weight (2 tr Sigma^2 / (n - 1)), a little too much for unequal weights
        and for heavier tails, too little where all |e_i| are alike.

        Where the inner products p_i are known, |e_i|^2 is taken as |g_i|^2 - 2 p_i + s, and that a unit lies in g
        itself, which shrinks this, is undone. Where they are not, |g_i|^2 stands for it, which adds
        4 Var <E g, e_i>: the error is then too large where the signal is not small beside one unit's noise. It
        assumes that |e_i|^2 and <E g, e_i> are not negatively correlated.

        Args:
            grad_norm_sq: s of the whole step's gradient, where the products with it and `unit_squares` are kept.
            scale: Factor that makes the c_i of these sums the weights with which the units lie in g.

        Returns:
            The error [grad^2]. It is itself an estimate: about as good as a variance from n - 1 numbers, and worse
            for heavy tails.

        Source: this project (derived, and checked by simulation).
        """
        if self.units < 3:
            return None
        squares, squares_sq, shrunk = self.squares, self.squares_sq, 1.0
        if grad_norm_sq is not None:
            if self.along is None:
                rows = zip(self.products, self.unit_squares, strict=True)
                pairs = [(c, square - 2 * p + grad_norm_sq) for (c, p), square in rows]
                squares = sum(float((c * q).sum()) for c, q in pairs)
                squares_sq = sum(float((c * q.square()).sum()) for c, q in pairs)
            else:
                squares += self.weight * grad_norm_sq - 2 * self.along.total
                squares_sq = self.along.distances_sq
            shrunk = 1 - scale * self.weight_sq / self.weight  # E |g_i - g|^2 / tr Sigma
        mean = squares / self.weight
        spread = max(squares_sq / self.weight - mean**2, 0.0) / (self.freedom * shrunk**2)
        return math.sqrt(spread * self.weight_sq / self.weight**2 / self.freedom)

    def products_in_sum(self) -> tuple[float, float]:
        """Return sum c_i p_i and sum c_i |p_i| over the kept products of all ranks."""
        if self.along is not None:
            return self.along.total, self.along.size
        assert self.ranks.count == 1, "over_ranks(grad_norm_sq) comes first"
        total = sum(float((c * p).sum()) for c, p in self.products)
        size = sum(float((c * p).abs().sum()) for c, p in self.products)
        return total, size

    def inner_product_variance(self) -> float:
        """Return Vp from the kept products of all ranks; NaN for fewer than two units."""
        if self.freedom <= 0:
            return math.nan
        if self.along is not None:
            return self.along.variance(self.weight) / self.freedom
        mean = self.products_in_sum()[0] / self.weight
        spread = sum(float((c * (p - mean).square()).sum()) for c, p in self.products)
        return spread / self.weight / self.freedom
