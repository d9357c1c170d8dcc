r"""A matrix product inside a layer: input and output gradient are known, but no module stands for it.

With A_i the input (T x d) and B_i the output gradient (T x p) of example i, the weight's gradient is B_i^T A_i, as for
a linear layer. The product may use only some rows of a weight that several products share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.linear import weight_square_norms
from adadagrad.statistics.rules.per_example_sums import products_per_example, squares_per_example


class ProductRule(AbstractRule[nn.Module]):
    """Exact rule for y = x W[rows]^T + bias[rows]; the layer is not asked. Input (n, T, d), output gradient (n, T, p).

    Args:
        start: First row of weight and bias that the product uses; it uses p of them.
        rows: All rows of weight and bias; None where the product uses them all.
    """

    def __init__(self, start: int = 0, rows: int | None = None) -> None:
        self._start, self._rows = start, rows

    def accepts(self, layer: nn.Module, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return True: the examples come first."""
        return True

    def gradients(self, layer: nn.Module, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return B_i^T A_i and the sum of B_i over positions, 0 in the rows that are not used."""
        found = {}
        if "weight" in names:
            found["weight"] = self._placed(torch.bmm(gy.mT, x))
        if "bias" in names:
            found["bias"] = self._placed(gy.sum(1))
        return found

    def square_norms(self, layer: nn.Module, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms by the cheaper of the two products."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if "bias" in names:
            total += squares_per_example(gy.sum(1))
        if "weight" in names:
            total += weight_square_norms(x, gy)
        return total

    def inner_products(self, layer: nn.Module, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <B_i, A_i times the directions>."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        used = slice(self._start, self._start + gy.shape[2])
        if "weight" in directions:
            total += products_per_example(gy, F.linear(x, directions["weight"][used]))
        if "bias" in directions:
            total += products_per_example(gy, directions["bias"][used])
        return total

    def _placed(self, gradients: Tensor) -> Tensor:
        """Put (n, p, ...) in its rows of (n, rows, ...)."""
        if self._rows is None:
            return gradients
        found = gradients.new_zeros(len(gradients), self._rows, *gradients.shape[2:])
        found[:, self._start : self._start + gradients.shape[1]] = gradients
        return found
