r"""Linear layers: for one position per example the gradient is an outer product, and its norm is two norms.

With A_i the input (T x d) and B_i the output gradient (T x p) of example i, the weight's gradient is B_i^T A_i.

- T = 1: |g_i|^2 = |a|^2 |b|^2, with the bias (|a|^2 + 1) |b|^2: no product at all.
  Sums over examples of squared coordinates are a product of squares, sum_i w_i b_io^2 a_id^2.
- T > 1: either |B_i^T A_i|_F^2 directly, 2 T d p flop, or the Gram form sum (A_i A_i^T) * (B_i B_i^T),
  2 T^2 (p + d) flop; the Gram form wins iff T (p + d) < p d, decided at every call because T changes.

Source: T = 1 from Goodfellow (2015), Efficient per-example gradient computations, arXiv 1510.01799.
Differs from the paper: the bias and T > 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.per_example_sums import (
    ROWS,
    at_least_single,
    dot_per_example,
    products_per_example,
    squares_per_example,
)


class LinearRule(AbstractRule[nn.Linear]):
    """Exact rule for `torch.nn.Linear` with any number of positions per example."""

    def accepts(self, layer: nn.Linear, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether the features are not the examples."""
        return dims[0] < x.dim() - 1

    def gradients(self, layer: nn.Linear, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return B_i^T A_i and the sum of B_i over positions."""
        a, b = _positions(x, layer.in_features), _positions(gy, layer.out_features)
        found = {}
        if "weight" in names:
            found["weight"] = torch.bmm(b.mT, a)
        if "bias" in names:
            found["bias"] = b.sum(1)
        return found

    def square_norms(self, layer: nn.Linear, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms by the cheapest of the three formulas."""
        if x.dim() == 2:
            output = squares_per_example(gy)
            if "weight" not in names:
                return output if "bias" in names else torch.zeros_like(output)
            factor = squares_per_example(x)
            return torch.addcmul(output, output, factor) if "bias" in names else output.mul_(factor)
        a, b = _positions(x, layer.in_features), _positions(gy, layer.out_features)
        total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
        if "bias" in names:
            total += squares_per_example(b.sum(1))
        if "weight" in names:
            total += weight_square_norms(a, b)
        return total

    def inner_products(self, layer: nn.Linear, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <B_i, the layer applied to A_i with the directions as parameters>."""
        weight = directions.get("weight")
        bias = directions.get("bias")
        if weight is None:
            if bias is None:
                return torch.zeros(len(x), dtype=torch.float64, device=x.device)
            return products_per_example(gy, bias)
        return products_per_example(gy, F.linear(x, weight, bias))

    def square_sums(
        self, layer: nn.Linear, x: Tensor, gy: Tensor, parameters: Mapping[str, Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the sums; for one position one product of squared inputs and squared output gradients."""
        if x.dim() > 2:
            return super().square_sums(layer, x, gy, parameters, weights)
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        for a, b, w in zip(*(torch.split(t, ROWS) for t in (x, gy, weights)), strict=True):
            b = at_least_single(b).square()
            b.mul_(w.to(b.dtype).unsqueeze(1))
            if "weight" in sums:
                sums["weight"] += b.mT @ at_least_single(a).square()
            if "bias" in sums:
                sums["bias"] += b.sum(0)
        return sums


def _positions(values: Tensor, features: int) -> Tensor:
    """Return (n, ..., features) as (n, T, features)."""
    return values.reshape(len(values), -1, features)


def weight_square_norms(a: Tensor, b: Tensor) -> Tensor:
    """Return |B_i^T A_i|_F^2 for a (n, T, d) and b (n, T, p), float64 (n,)."""
    n, positions, d = a.shape
    p = b.shape[2]
    size = a.element_size()
    if positions * (p + d) < p * d:
        a, b = at_least_single(a), at_least_single(b)
        pieces = [
            dot_per_example(torch.bmm(a[part], a[part].mT), torch.bmm(b[part], b[part].mT))
            for part in chunks(n, 2 * positions * positions * size, room(a))
        ]
    else:
        pieces = [squares_per_example(torch.bmm(b[part].mT, a[part])) for part in chunks(n, p * d * size, room(a))]
    return torch.cat(pieces)
