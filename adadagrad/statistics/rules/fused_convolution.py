"""Convolutions: n examples side by side are one example with n times the channels in n times the groups.

The weight gradient of that one example holds the n weight gradients; no patches are formed. A first layer with fewer
than eight channels, where such a convolution is slow, forms its patches a megabyte at a time and multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.convolution import Convolution, has_few_channels, pad, patch_view, weight_gradients
from adadagrad.statistics.rules.fused import AbstractFusedRule, ExampleGradients
from adadagrad.statistics.rules.patch_gram import gram_is_cheaper

PATCH_BYTES = 1 << 20
"""Bytes of patches that exist at a time in a first layer."""


class FusedConvolution(AbstractFusedRule[nn.Conv1d | nn.Conv2d | nn.Conv3d]):
    """Fused rule for contiguous convolutions with symmetric zero padding."""

    def suits(self, layer: Convolution, x: Tensor) -> bool:
        """Return whether the layout allows it, and norms are not had for less."""
        return self.can(layer, x) and not (isinstance(layer, nn.Conv2d) and gram_is_cheaper(layer, x))

    def can(self, layer: Convolution, x: Tensor) -> bool:
        """Return whether the layout allows it."""
        return (
            layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and x.dim() == layer.weight.dim()
            and x.is_contiguous()
            and layer.weight.is_contiguous()
        )

    def forward(self, layer: Convolution, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output."""
        return layer._conv_forward(x, layer.weight, layer.bias), ()

    def backward(
        self, layer: Convolution, x: Tensor, saved: tuple[Tensor, ...], gy: Tensor, *, wants_x: bool
    ) -> tuple[Tensor | None, ExampleGradients]:
        """Return the input's gradient by one convolution, and the parameters' example by example."""
        gy, padding = gy.contiguous(), [int(p) for p in layer.padding]
        dx = None
        if wants_x:
            dx = torch.ops.aten.convolution_backward(
                gy, x, layer.weight, None, list(layer.stride), padding, list(layer.dilation),
                False, [0] * len(padding), layer.groups, [True, False, False],
            )[0]  # fmt: skip
        return dx, self._products(layer, x, padding, gy)

    @staticmethod
    def _products(layer: Convolution, x: Tensor, padding: list[int], gy: Tensor) -> ExampleGradients:
        if has_few_channels(layer, x):
            yield from _from_patches(layer, x, padding, gy)
            return
        for part in even_chunks(len(x), layer.weight.numel() * gy.element_size(), room(gy)):
            found = {"weight": weight_gradients(layer, x[part], padding, gy[part])}
            if layer.bias is not None:
                found["bias"] = gy[part].flatten(2).sum(2)
            yield found


def even_chunks(n: int, bytes_per_example: int, room: int) -> Iterator[slice]:
    """Cut n examples into slices of nearly equal, even length: a convolution of an odd number of groups is slower.

    Args:
        n: Number of examples.
        bytes_per_example: Bytes of one example's gradient; a slice's fit into `room`, but for a slice of two.
        room: Bytes to fit into.

    Yields:
        Slices that cover range(n) in order.
    """
    most = max(2, room // bytes_per_example)
    length = -(-n // -(-n // most))
    length += length % 2
    for start in range(0, n, length):
        yield slice(start, min(n, start + length))


def _from_patches(layer: Convolution, x: Tensor, padding: list[int], gy: Tensor) -> ExampleGradients:
    """Form the gradients from patches; a row of ones below the patches makes the bias's gradient the last column."""
    n, depth, positions = len(x), layer.weight[0].numel(), gy[0, 0].numel()
    columns = depth + (layer.bias is not None)
    length = max(1, room(gy, PATCH_BYTES) // (columns * positions * gy.element_size()))
    space = gy.new_empty(min(n, length), columns, positions)
    space[:, depth:] = 1
    padded = pad(x, padding)
    for whole in chunks(n, layer.out_channels * columns * gy.element_size(), room(gy)):
        found = gy.new_empty(whole.stop - whole.start, layer.out_channels, columns)
        for start in range(whole.start, whole.stop, length):
            stop = min(start + length, whole.stop)
            patches = space[: stop - start]
            patches[:, :depth].view(stop - start, *layer.weight.shape[1:], *gy.shape[2:]).copy_(
                patch_view(layer, padded[start:stop], gy)
            )
            torch.bmm(gy[start:stop].flatten(2), patches.mT, out=found[start - whole.start : stop - whole.start])
        gradients = {"weight": found[:, :, :depth], "bias": found[:, :, depth]}
        yield gradients if layer.bias is not None else {"weight": found}
