r"""Convolutions of one, two and three dimensions: per-example weight gradients as one grouped convolution.

A batch (n, C, ...) laid out contiguously *is* a single example (1, n C, ...). The weight gradient of that one
example under n times the groups is the n separate weight gradients, with no unfolded copy of the input:
groups, stride, dilation and padding carry over unchanged. A first layer with a few channels is the exception: its
input patches are small, and a batched product over them is about twice as fast as a convolution of so few channels.
Flops of either: one more weight gradient (2 T d p an example, T output positions, d = C/groups * kernel, p output
channels). Memory: a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.patch_gram import gram_is_cheaper, gram_square_norms
from adadagrad.statistics.rules.per_example_sums import products_per_example, squares_per_example

FEW_CHANNELS = 8
"""Below this many input channels a two-dimensional weight gradient is formed from patches."""

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvolutionRule(AbstractRule[nn.Conv1d | nn.Conv2d | nn.Conv3d]):
    """Exact rule for `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, every padding mode included."""

    def accepts(self, layer: Convolution, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether the examples come first; a convolution along the examples mixes them or is unbatched."""
        return dims == (0, 0) and x.dim() == layer.weight.dim()

    def gradients(self, layer: Convolution, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the per-example weight gradients (n, *weight shape) and bias gradients (n, channels)."""
        found = {}
        if "weight" in names:
            inputs, padding = _padded(layer, x)
            form = _from_patches if has_few_channels(layer, x) else weight_gradients
            found["weight"] = form(layer, inputs, padding, gy).view(-1, *layer.weight.shape)
        if "bias" in names:
            found["bias"] = gy.flatten(2).sum(2)
        return found

    def square_norms(self, layer: Convolution, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms, forming a few megabytes of per-example gradients at a time."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if "bias" in names:
            total += squares_per_example(gy.flatten(2).sum(2))
        if "weight" in names and isinstance(layer, nn.Conv2d) and gram_is_cheaper(layer, x):
            total += gram_square_norms(layer, x, gy)
        elif "weight" in names:
            for part in chunks(len(x), _bytes_at_once(layer, x, gy), room(x)):
                total[part] += squares_per_example(self.gradients(layer, x[part], gy[part], {"weight"})["weight"])
        return total

    def inner_products(self, layer: Convolution, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <gy_i, the convolution of x_i with the directions as its parameters>."""
        weight, bias = directions.get("weight"), directions.get("bias")
        if weight is None:
            return gy.flatten(2).sum(2).double() @ directions["bias"].double()
        inputs, padding = _padded(layer, x)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        y = convolve(inputs, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
        return products_per_example(gy, y)

    def bytes_per_example(self, layer: Convolution, x: Tensor, gy: Tensor, parameters: Mapping[str, Tensor]) -> int:
        """Return the bytes of one example's gradients, or of its patches where these are formed."""
        return max(super().bytes_per_example(layer, x, gy, parameters), _bytes_at_once(layer, x, gy))


def _padded(layer: Convolution, x: Tensor) -> tuple[Tensor, list[int]]:
    """Return the input with explicit padding where the layer's is not symmetric zeros, and what is left to pad."""
    symmetric = not isinstance(layer.padding, str)
    if layer.padding_mode == "zeros" and symmetric:
        return x, [int(p) for p in layer.padding]
    if layer.padding == "valid":
        return x, [0] * (x.dim() - 2)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), [0] * (x.dim() - 2)


def weight_gradients(layer: Convolution, x: Tensor, padding: list[int], gy: Tensor) -> Tensor:
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


def has_few_channels(layer: Convolution, x: Tensor) -> bool:
    """Return whether patches are the faster way for this layer."""
    return x.dim() == 4 and layer.groups == 1 and x.shape[1] < FEW_CHANNELS


def _bytes_at_once(layer: Convolution, x: Tensor, gy: Tensor) -> int:
    """Return the bytes that one example takes: its weight gradient, or its patches where these are formed."""
    elements = layer.weight.numel()
    if has_few_channels(layer, x):
        elements = max(elements, layer.weight[0].numel() * gy[0, 0].numel())
    return elements * gy.element_size()


def _from_patches(layer: Convolution, x: Tensor, padding: list[int], gy: Tensor) -> Tensor:
    """Return the weight gradients (n, p, d) as products of output gradients (n, p, T) and patches (n, d, T)."""
    return torch.bmm(gy.flatten(2), patches_of(layer, x, padding, gy).mT)


def patches_of(layer: Convolution, x: Tensor, padding: list[int], gy: Tensor) -> Tensor:
    """Return what each output position sees of the input, (n, d, T).

    Args:
        layer: The convolution.
        x: Its input (n, C, H, W).
        padding: Zeros on each side of height and width.
        gy: Any tensor of the output's shape.

    Returns:
        A copy, kernel times the size of the input.
    """
    shape = (len(x), layer.weight[0].numel(), -1)
    return patch_view(layer, pad(x, padding), gy).reshape(shape)


def pad(x: Tensor, padding: list[int]) -> Tensor:
    """Return x (n, C, H, W) with zeros on each side of height and width, contiguous."""
    if not any(padding):
        return x.contiguous()
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0])).contiguous()


def patch_view(layer: Convolution, padded: Tensor, gy: Tensor) -> Tensor:
    """Return a view of what each output position sees, (n, C, *kernel, *output size).

    Args:
        layer: The convolution.
        padded: Its input with its padding, contiguous (n, C, H, W).
        gy: Any tensor of the output's size.
    """
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    s0, s1, s2, s3 = padded.stride()
    shape = (*padded.shape[:2], *kernel, *gy.shape[2:])
    return padded.as_strided(
        shape,
        (s0, s1, dilation[0] * s2, dilation[1] * s3, stride[0] * s2, stride[1] * s3),
        padded.storage_offset(),
    )
