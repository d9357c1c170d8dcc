r"""Convolutions of one, two and three dimensions: per-example weight gradients as one grouped convolution.

A batch (n, C, ...) laid out contiguously *is* a single example (1, n C, ...). The weight gradient of that one
example under n times the groups is the n separate weight gradients, with no unfolded copy of the input:
groups, stride, dilation and padding carry over unchanged. Flops: one more weight gradient (2 T d p an example,
T output positions, d = C/groups * kernel, p output channels). Memory: a few megabytes of gradients at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule, chunks, squares_per_example, sum_per_example

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvolutionRule(AbstractRule[nn.Conv1d | nn.Conv2d | nn.Conv3d]):
    """Exact rule for `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, every padding mode included."""

    def gradients(self, layer: Convolution, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the per-example weight gradients (n, *weight shape) and bias gradients (n, channels)."""
        found = {}
        if "weight" in names:
            found["weight"] = _weight_gradients(layer, *_padded(layer, x), gy)
        if "bias" in names:
            found["bias"] = gy.flatten(2).sum(2)
        return found

    def square_norms(self, layer: Convolution, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms, forming a few megabytes of per-example gradients at a time."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if "bias" in names:
            total += squares_per_example(gy.flatten(2).sum(2))
        if "weight" in names:
            inputs, padding = _padded(layer, x)
            for part in chunks(len(x), layer.weight.numel() * gy.element_size()):
                total[part] += squares_per_example(_weight_gradients(layer, inputs[part], padding, gy[part]))
        return total

    def inner_products(self, layer: Convolution, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <gy_i, the convolution of x_i with the directions as its parameters>."""
        weight, bias = directions.get("weight"), directions.get("bias")
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if bias is not None:
            total += gy.flatten(2).sum(2).double() @ bias.double()
        if weight is not None:
            inputs, padding = _padded(layer, x)
            convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
            y = convolve(inputs, weight, None, layer.stride, padding, layer.dilation, layer.groups)
            total += sum_per_example(gy * y)
        return total


def _padded(layer: Convolution, x: Tensor) -> tuple[Tensor, list[int]]:
    """Return the input with explicit padding where the layer's is not symmetric zeros, and what is left to pad."""
    symmetric = not isinstance(layer.padding, str)
    if layer.padding_mode == "zeros" and symmetric:
        return x, [int(p) for p in layer.padding]
    if layer.padding == "valid":
        return x, [0] * (x.dim() - 2)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), [0] * (x.dim() - 2)


def _weight_gradients(layer: Convolution, x: Tensor, padding: list[int], gy: Tensor) -> Tensor:
    """Return the n weight gradients (n, *weight shape) of n examples by one grouped weight gradient."""
    n = len(x)
    shape = layer.weight.shape
    merged_x = x.reshape(1, n * x.shape[1], *x.shape[2:])
    merged_gy = gy.reshape(1, n * gy.shape[1], *gy.shape[2:])
    weight = gy.new_empty((n * shape[0], *shape[1:]))
    gradient = torch.ops.aten.convolution_backward(
        merged_gy,
        merged_x,
        weight,
        None,
        list(layer.stride),
        padding,
        list(layer.dilation),
        False,
        [0] * len(padding),
        n * layer.groups,
        [False, True, False],
    )[1]
    return gradient.view(n, *shape)  # type: ignore[no-any-return]
