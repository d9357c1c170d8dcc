r"""Transposed convolutions: per-example weight gradients as one grouped transposed convolution.

As for a convolution, a contiguous batch (n, C, ...) *is* a single example (1, n C, ...), and the weight gradient of
that example under n times the groups is the n separate ones: (n C, channels/groups, kernel) is (n, *weight shape).
Flops: one more weight gradient, 2 T d p an example (T input positions, d input channels / groups, p output channels *
kernel). Memory: a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.per_example_sums import products_per_example, squares_per_example

Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class TransposedConvolutionRule(AbstractRule[nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d]):
    """Exact rule for `torch.nn.ConvTranspose1d`, `ConvTranspose2d` and `ConvTranspose3d`, ``output_size`` included."""

    def accepts(self, layer: Transposed, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether the examples come first; a convolution along the examples mixes them or is unbatched."""
        return dims == (0, 0) and x.dim() == layer.weight.dim()

    def gradients(self, layer: Transposed, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the per-example weight gradients (n, *weight shape) and bias gradients (n, channels)."""
        found = {}
        if "weight" in names:
            found["weight"] = _weight_gradients(layer, x, gy)
        if "bias" in names:
            found["bias"] = gy.flatten(2).sum(2)
        return found

    def square_norms(self, layer: Transposed, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms, forming a few megabytes of per-example gradients at a time."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if "bias" in names:
            total += squares_per_example(gy.flatten(2).sum(2))
        if "weight" in names:
            for part in chunks(len(x), layer.weight.numel() * gy.element_size(), room(gy)):
                total[part] += squares_per_example(_weight_gradients(layer, x[part], gy[part]))
        return total

    def inner_products(self, layer: Transposed, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <gy_i, the transposed convolution of x_i with the directions as its parameters>."""
        weight, bias = directions.get("weight"), directions.get("bias")
        if weight is None:
            return gy.flatten(2).sum(2).double() @ directions["bias"].double()
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
        padding, output_padding = _paddings(layer, x, gy)
        y = convolve(x, weight, bias, layer.stride, padding, output_padding, layer.groups, layer.dilation)
        return products_per_example(gy, y)


def _paddings(layer: Transposed, x: Tensor, gy: Tensor) -> tuple[list[int], list[int]]:
    """Return the padding, and the output padding that makes the output as large as it was."""
    padding = [int(p) for p in layer.padding]
    sizes = zip(x.shape[2:], gy.shape[2:], layer.kernel_size, layer.stride, layer.dilation, padding, strict=True)
    return padding, [out - ((size - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, k, s, d, p in sizes]


def _weight_gradients(layer: Transposed, x: Tensor, gy: Tensor) -> Tensor:
    """Return the n weight gradients (n, *weight shape) of n examples by one grouped weight gradient."""
    n, shape = len(x), layer.weight.shape
    padding, output_padding = _paddings(layer, x, gy)
    gradient = torch.ops.aten.convolution_backward(
        gy.reshape(1, n * gy.shape[1], *gy.shape[2:]),
        x.reshape(1, n * x.shape[1], *x.shape[2:]),
        gy.new_empty((n * shape[0], *shape[1:])),
        None,
        list(layer.stride),
        padding,
        list(layer.dilation),
        True,
        output_padding,
        n * layer.groups,
        [False, True, False],
    )[1]
    return gradient.view(n, *shape)  # type: ignore[no-any-return]
