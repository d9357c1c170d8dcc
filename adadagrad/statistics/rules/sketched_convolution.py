r"""Convolutions, sketched: u_i = A_i w is an ordinary convolution with k output filters per group, no patch is formed.

With u_i (k maps of the output's size) and B_i the output gradient, v_i = B_i^T u_i = g_i w. The groups have signs of
their own, so that their errors are independent. For T positions, d = channels/groups * kernel, g groups, p output
channels and k probes: 2 T k (d g + p) flop, beside 2 T d p for the exact norms. On a CPU the thin convolution is slower
than its flops say, and exact norms of a part of the batch were found to be the better bargain.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.convolution import Convolution
from adadagrad.statistics.rules.patch_gram import gram_cost, gram_is_cheaper
from adadagrad.statistics.rules.per_example_sums import at_least_single
from adadagrad.statistics.rules.sketched import AbstractSketch

SMALL_PATCH = 27
"""Up to this many inputs of an output channel (a first layer, a depthwise one) the exact norms are nearly free."""


class ConvolutionSketch(AbstractSketch[nn.Conv1d | nn.Conv2d | nn.Conv3d]):
    """Sketch for `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, every padding mode included."""

    def pays(self, layer: Convolution, x: Tensor, probes: int) -> bool:
        """Return whether patches are not small, and the thin convolution and product are the fewer flops."""
        d, p = layer.weight[0].numel(), layer.out_channels
        cost = probes * (d * layer.groups + p)
        if d <= SMALL_PATCH or cost >= d * p or x.numel() == 0:
            return False
        gram = gram_cost(layer, x) if isinstance(layer, nn.Conv2d) and gram_is_cheaper(layer, x) else None
        return gram is None or cost * gram[1] < gram[0] * d * p  # both costs per position of the output

    def shape(self, layer: Convolution, probes: int) -> tuple[int, ...]:
        """Return (k, groups, channels/groups, *kernel)."""
        return probes, layer.groups, *layer.weight.shape[1:]

    def examples(self, layer: Convolution, x: Tensor, gy: Tensor, signs: Tensor) -> Tensor:
        """Return (n, k, p)."""
        n, groups, probes = len(x), layer.groups, len(signs)
        filters = signs.transpose(0, 1).reshape(groups * probes, *signs.shape[2:])
        u = layer._conv_forward(x, filters, None)
        u, b = (at_least_single(t).reshape(n * groups, -1, gy[0, 0].numel()) for t in (u, gy))
        return torch.bmm(u, b.mT).view(n, groups, probes, -1).transpose(1, 2).flatten(2)

    def of_gradient(self, gradient: Tensor, signs: Tensor) -> Tensor:
        """Return (k, p)."""
        groups = signs.shape[1]
        rows = gradient.reshape(groups, len(gradient) // groups, -1)
        return torch.bmm(signs.flatten(2).transpose(0, 1), rows.mT).transpose(0, 1).flatten(1)
