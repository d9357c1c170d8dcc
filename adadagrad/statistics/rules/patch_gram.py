r"""Convolutions on small maps: norms from Gram matrices over positions, without forming patches or gradients.

With P_i the patches (T x d) and B_i the output gradient (T x p) of example i, |P_i^T B_i|^2 = sum (P_i P_i^T) * (B_i
B_i^T). The products of patches are sums of products of padded positions, shifted over the kernel: with G = X^T X over
all pairs of padded positions, (P P^T)[t, t'] = sum over kernel offsets k of G[t + k, t' + k].

Cost per example: Tp^2 C + T^2 p + 8 k T^2 for Tp padded positions, C channels and a kernel of k elements, beside T d p
for the direct product; the 8 is what adding shifted matrices costs on a CPU. Used where it is less than half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.per_example_sums import at_least_single, dot_per_example


def gram_is_cheaper(layer: nn.Conv2d, x: Tensor) -> bool:
    """Return whether a convolution's norms are had for less than half of the direct product in this way.

    Args:
        layer: The convolution.
        x: Its input (n, C, H, W).
    """
    costs = gram_cost(layer, x)
    return costs is not None and 2 * costs[0] < costs[1]


def gram_cost(layer: nn.Conv2d, x: Tensor) -> tuple[int, int] | None:
    """Return what an example costs in this way and directly, in products and sums; None where this way is closed.

    Args:
        layer: The convolution.
        x: Its input (n, C, H, W).
    """
    if layer.groups != 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return None
    height, width = (size + 2 * int(pad) for size, pad in zip(x.shape[2:], layer.padding, strict=True))
    kernel = layer.kernel_size[0] * layer.kernel_size[1]
    outputs = 1
    for size, k, stride, dilation in zip((height, width), layer.kernel_size, layer.stride, layer.dilation, strict=True):
        outputs *= (size - dilation * (k - 1) - 1) // stride + 1
    channels, made = x.shape[1], layer.out_channels
    gram = (height * width) ** 2 * channels + outputs**2 * (made + 8 * kernel)
    return gram, outputs * channels * kernel * made


def gram_square_norms(layer: nn.Conv2d, x: Tensor, gy: Tensor) -> Tensor:
    r"""Return \|weight gradient\|^2 of every example.

    Args:
        layer: The convolution, without groups, with zero padding.
        x: Its input (n, C, H, W).
        gy: Its output's gradient (n, p, Ho, Wo).

    Returns:
        float64 (n,).
    """
    rows, columns = (int(p) for p in layer.padding)
    positions = (x.shape[2] + 2 * rows) * (x.shape[3] + 2 * columns)
    pieces = []
    for part in chunks(len(x), positions**2 * max(4, x.element_size()), room(x)):
        padded = F.pad(x[part], (columns, columns, rows, rows))
        pieces.append(_norms(layer, padded, gy[part]))
    return torch.cat(pieces)


def _norms(layer: nn.Conv2d, padded: Tensor, gy: Tensor) -> Tensor:
    padded, gy = at_least_single(padded), at_least_single(gy)  # products of products leave the range of float16
    n, _, height, width = padded.shape
    flat = padded.flatten(2)
    products = torch.bmm(flat.mT, flat).view(n, height, width, height, width)
    out_height, out_width = gy.shape[2:]
    (s, r), (dilation, spread) = layer.stride, layer.dilation
    total: Tensor | None = None
    for i in range(layer.kernel_size[0]):
        for j in range(layer.kernel_size[1]):
            down = slice(i * dilation, i * dilation + s * (out_height - 1) + 1, s)
            right = slice(j * spread, j * spread + r * (out_width - 1) + 1, r)
            shifted = products[:, down, right, down, right]
            total = shifted.clone() if total is None else total.add_(shifted)
    assert total is not None
    outer = gy.flatten(2)
    return dot_per_example(total.reshape(n, -1), torch.bmm(outer.mT, outer).reshape(n, -1))
