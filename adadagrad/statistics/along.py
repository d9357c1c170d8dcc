"""Sums over the units of all ranks that take their inner products with g: made on each rank, sent once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AlongGradient:
    """What Vp and the error of V are made of, with p_i = <g_i, g> and s = |g|^2.

    Squares are taken around s, which is the mean of the p_i where every example is measured: so they can be added up
    without a message that tells the mean first, and nothing cancels.

    Args:
        grad_norm_sq: s, of the whole step.
        total: sum c_i p_i.
        size: sum c_i |p_i|, for what rounding may have made of the total.
        spread: sum c_i (p_i - s)^2.
        distances_sq: sum c_i (|g_i|^2 - 2 p_i + s)^2, which is |g_i - g|^4.
    """

    grad_norm_sq: float
    total: float
    size: float
    spread: float
    distances_sq: float

    def variance(self, weight: float) -> float:
        """Return sum w_i (p_i - pbar)^2 with pbar = sum w_i p_i and w_i = c_i / `weight`."""
        return max(self.spread / weight - (self.total / weight - self.grad_norm_sq) ** 2, 0.0)


def along_gradient(
    products: Sequence[tuple[Tensor, Tensor]], unit_squares: Sequence[Tensor], s: float
) -> AlongGradient:
    """Return the sums over one rank's units.

    Args:
        products: c_i and p_i, float64 (n,) each, in groups.
        unit_squares: |g_i|^2, float64 (n,), in the same groups.
        s: |g|^2 of the whole step.
    """
    total = size = spread = distances_sq = 0.0
    for (c, p), squares in zip(products, unit_squares, strict=True):
        total += float((c * p).sum())
        size += float((c * p).abs().sum())
        spread += float((c * (p - s).square()).sum())
        distances_sq += float((c * (squares - 2 * p + s).square()).sum())
    return AlongGradient(grad_norm_sq=s, total=total, size=size, spread=spread, distances_sq=distances_sq)
