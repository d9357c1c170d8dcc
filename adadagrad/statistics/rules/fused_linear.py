"""Linear layers with several positions: B_i^T A_i of every example, summed to the weight gradient.

Cost beside the ordinary backward: writing and reading (p, d) for every example, some megabytes at a time, no flop. With
one position per example nothing is fused, for the norm is then a product of two norms (`linear.py`). Nor is it with so
few positions that the Gram form, a flop more but few bytes, costs less.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.chunking import room
from adadagrad.statistics.rules.fused import AbstractFusedRule, ExampleGradients

PRODUCT_BYTES = 1 << 22
"""Most bytes of products that exist at a time: what a cache holds until norm and sum are taken."""


def gram_costs_less(positions: int, d: int, p: int) -> bool:
    """Return whether norms from products of positions cost less than a weight gradient formed example by example.

    Both are counted in flops, a byte as 13 of them. The Gram form must come out at less than a third of the fused one:
    where both were timed (T = 8 to 128, d and p = 64 to 768, two cores) they took equally long at 0.25 to 0.45 of it.
    Never where `LinearRule` would form the products anyway.

    Args:
        positions: T.
        d: Inputs of the layer.
        p: Its outputs.
    """
    gram = 2 * positions**2 * (p + d) + 208 * positions**2
    fused = 104 * p * d + positions * p * d / 2
    return positions * (p + d) < p * d and 3 * gram < fused


class FusedLinear(AbstractFusedRule[nn.Linear]):
    """Fused rule for `torch.nn.Linear` on (n, ..., features) with at least one dimension in between."""

    def suits(self, layer: nn.Linear, x: Tensor) -> bool:
        """Return whether there are several positions, too many for the Gram form."""
        return self.can(layer, x) and not gram_costs_less(x.shape[1:-1].numel(), layer.in_features, layer.out_features)

    def can(self, layer: nn.Linear, x: Tensor) -> bool:
        """Return whether there are dimensions of positions: coordinates need every product, however few these are."""
        return x.dim() > 2

    def forward(self, layer: nn.Linear, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output."""
        return nn.functional.linear(x, layer.weight, layer.bias), ()

    def backward(
        self, layer: nn.Linear, x: Tensor, saved: tuple[Tensor, ...], gy: Tensor, *, wants_x: bool
    ) -> tuple[Tensor | None, ExampleGradients]:
        """Return gy W, and B_i^T A_i with the sum of B_i over positions."""
        return gy.matmul(layer.weight) if wants_x else None, self._products(layer, x, gy)

    @staticmethod
    def _products(layer: nn.Linear, x: Tensor, gy: Tensor) -> ExampleGradients:
        a, b = (t.reshape(len(x), -1, t.shape[-1]) for t in (x, gy))
        length = max(1, room(gy, PRODUCT_BYTES) // (layer.weight.numel() * gy.element_size()))
        space = gy.new_empty(min(length, len(x)), *layer.weight.shape)
        for start in range(0, len(x), length):
            part = slice(start, min(start + length, len(x)))
            found = {"weight": torch.bmm(b[part].mT, a[part], out=space[: part.stop - start])}
            if layer.bias is not None:
                found["bias"] = b[part].sum(1)
            yield found
