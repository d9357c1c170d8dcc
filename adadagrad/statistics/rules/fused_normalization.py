"""GroupNorm and LayerNorm: gain and shift gradients of every example from one backward of the normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.fused import AbstractFusedRule, ExampleGradients


class FusedGroupNorm(AbstractFusedRule[nn.GroupNorm]):
    """Fused rule for `torch.nn.GroupNorm`: n examples are one with n times the channels and groups."""

    def suits(self, layer: nn.GroupNorm, x: Tensor) -> bool:
        """Return whether the input is (n, C, positions ...) in memory."""
        return x.dim() > 2 and x.is_contiguous() and layer.bias is not None

    def forward(self, layer: nn.GroupNorm, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output, and mean and 1/standard deviation of every group."""
        n, channels = x.shape[:2]
        y, mean, rstd = torch.native_group_norm(
            x, layer.weight, layer.bias, n, channels, x[0, 0].numel(), layer.num_groups, layer.eps
        )
        return y, (mean, rstd)

    def backward(
        self, layer: nn.GroupNorm, x: Tensor, saved: tuple[Tensor, ...], gy: Tensor, *, wants_x: bool
    ) -> tuple[Tensor | None, ExampleGradients]:
        """Return all gradients from one call."""
        n, channels = x.shape[:2]
        mean, rstd = (t.view(1, -1) for t in saved)
        wide = (1, n * channels, *x.shape[2:])
        dx, gains, shifts = torch.ops.aten.native_group_norm_backward(
            gy.contiguous().view(wide), x.view(wide), mean, rstd, layer.weight.repeat(n), 1, n * channels,
            x[0, 0].numel(), n * layer.num_groups, [wants_x, True, True],
        )  # fmt: skip
        found = {"weight": gains.view(n, channels), "bias": shifts.view(n, channels)}
        return dx.view_as(x) if wants_x else None, iter([found])


class FusedLayerNorm(AbstractFusedRule[nn.LayerNorm]):
    """Fused rule for `torch.nn.LayerNorm` on (n, ..., features): the ordinary sums over positions, not examples."""

    def suits(self, layer: nn.LayerNorm, x: Tensor) -> bool:
        """Return whether there are gain and shift and several positions."""
        return x.dim() > 1 + len(layer.normalized_shape) and x.is_contiguous() and layer.bias is not None

    def forward(self, layer: nn.LayerNorm, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output, and mean and 1/standard deviation of every position."""
        y, mean, rstd = torch.native_layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
        return y, (mean, rstd)

    def backward(
        self, layer: nn.LayerNorm, x: Tensor, saved: tuple[Tensor, ...], gy: Tensor, *, wants_x: bool
    ) -> tuple[Tensor | None, ExampleGradients]:
        """Return the input's gradient from the kernel, gain and shift from the normalised input."""
        mean, rstd = saved
        shape = (len(x), -1, *layer.normalized_shape)
        gains = ((x - mean).mul_(rstd).mul_(gy)).view(shape).sum(1)
        shifts = gy.reshape(shape).sum(1)
        dx = None
        if wants_x:
            dx = torch.ops.aten.native_layer_norm_backward(
                gy, x, layer.normalized_shape, mean, rstd, layer.weight, layer.bias, [True, False, False]
            )[0]
        return dx, iter([{"weight": gains, "bias": shifts}])
