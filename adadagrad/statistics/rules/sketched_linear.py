r"""Linear layers with several positions, sketched: u_i = A_i w, then v_i = B_i^T u_i = g_i w.

A_i (T x d) is the input and B_i (T x p) the output gradient of example i. Two thin products, 2 T k (d + p) flop for k
probes, beside 2 T d p or 2 T^2 (d + p) for the exact norms. The signs multiply the side with fewer features: there the
diagonal that carries no error is the larger part of M, and fewer signs are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.per_example_sums import at_least_single
from adadagrad.statistics.rules.sketched import AbstractSketch


class LinearSketch(AbstractSketch[nn.Linear]):
    """Sketch for `torch.nn.Linear` on (n, ..., features) with at least one dimension in between."""

    def pays(self, layer: nn.Linear, x: Tensor, probes: int) -> bool:
        """Return whether there are several positions, and the thin products are the fewer flops."""
        if x.dim() < 3 or x.numel() == 0:
            return False
        d, p = layer.in_features, layer.out_features
        positions = x[0].numel() // d
        return probes * (d + p) < min(d * p, positions * (d + p))

    def shape(self, layer: nn.Linear, probes: int) -> tuple[int, ...]:
        """Return (k, features of the smaller side)."""
        return probes, min(layer.in_features, layer.out_features)

    def examples(self, layer: nn.Linear, x: Tensor, gy: Tensor, signs: Tensor) -> Tensor:
        """Return (n, k, features of the larger side)."""
        a, b = (t.reshape(len(x), -1, t.shape[-1]) for t in (x, gy))
        if layer.in_features > layer.out_features:
            a, b = b, a
        u = at_least_single(torch.matmul(a, signs.mT))
        return torch.bmm(u.mT, at_least_single(b))

    def of_gradient(self, gradient: Tensor, signs: Tensor) -> Tensor:
        """Return (k, features of the larger side)."""
        p, d = gradient.shape
        return torch.matmul(signs, gradient if d > p else gradient.mT)
