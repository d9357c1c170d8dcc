"""Convolutions: n examples side by side are one example with n times the channels in n times the groups.

The weight gradient of that one example holds the n weight gradients; no patches are formed. A first layer with fewer
than eight channels, where such a convolution is slow, forms its patches a megabyte at a time and multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.base import CHUNK_BYTES, chunks
from adadagrad.statistics.rules.convolution import Convolution, has_few_channels, patches_of, weight_gradients
from adadagrad.statistics.rules.fused import AbstractFusedRule, ExampleGradients
from adadagrad.statistics.rules.patch_gram import gram_is_cheaper

PATCH_BYTES = 1 << 20
"""Bytes of patches that exist at a time in a first layer."""


class FusedConvolution(AbstractFusedRule[nn.Conv1d | nn.Conv2d | nn.Conv3d]):
    """Fused rule for contiguous convolutions with symmetric zero padding."""

    def suits(self, layer: Convolution, x: Tensor) -> bool:
        """Return whether the layout allows it."""
        return (
            layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
            and x.dim() == layer.weight.dim()
            and x.is_contiguous()
            and layer.weight.is_contiguous()
            and not (isinstance(layer, nn.Conv2d) and gram_is_cheaper(layer, x))
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
        few, size = has_few_channels(layer, x), layer.weight.numel() * gy.element_size()
        if few:
            size = CHUNK_BYTES // PATCH_BYTES * layer.weight[0].numel() * gy[0, 0].numel() * gy.element_size()
        for part in chunks(len(x), size):
            if few:
                found = {"weight": torch.bmm(gy[part].flatten(2), patches_of(layer, x[part], padding, gy[part]).mT)}
            else:
                found = {"weight": weight_gradients(layer, x[part], padding, gy[part])}
            if layer.bias is not None:
                found["bias"] = gy[part].flatten(2).sum(2)
            yield found
