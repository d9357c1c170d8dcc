"""Linear layers with several positions: B_i^T A_i of every example, summed to the weight gradient.

Cost beside the ordinary backward: writing and reading (n, p, d), no flop. With one position per example nothing is
fused, for the norm is then a product of two norms (`linear.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.fused import AbstractFusedRule, ExampleGradients

MOST_BYTES = 1 << 28
"""Largest (n, p, d) that is formed at once; beyond it the norms are taken chunk by chunk, without fusing."""


class FusedLinear(AbstractFusedRule[nn.Linear]):
    """Fused rule for `torch.nn.Linear` on (n, ..., features) with at least one dimension in between."""

    def suits(self, layer: nn.Linear, x: Tensor) -> bool:
        """Return whether there are several positions and the products fit into memory."""
        return x.dim() > 2 and len(x) * layer.weight.numel() * x.element_size() <= MOST_BYTES

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
        b = gy.reshape(len(x), -1, layer.out_features)
        found = {"weight": torch.bmm(b.mT, x.reshape(len(x), -1, layer.in_features))}
        if layer.bias is not None:
            found["bias"] = b.sum(1)
        yield found
