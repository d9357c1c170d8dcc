r"""InstanceNorm, and BatchNorm in eval mode: gain and shift of every channel act on an input normalised alone.

With xhat the normalised input, the gain's gradient of example i is the sum of gy_i * xhat_i over positions, the
shift's the sum of gy_i. InstanceNorm normalises every example alone; with running statistics in eval mode both are an
affine map of each channel. BatchNorm in training mode mixes the examples and is refused before it comes here.
Cost per example: about 4 T p flop, and p numbers (T positions, p channels).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.per_example_sums import at_least_single
from adadagrad.statistics.rules.small import AbstractSmallRule

Channelwise: TypeAlias = nn.modules.batchnorm._NormBase


class ChannelNormRule(AbstractSmallRule[nn.modules.batchnorm._NormBase]):
    """Exact rule for `torch.nn.InstanceNorm1d/2d/3d`, and for `BatchNorm1d/2d/3d` and `SyncBatchNorm` in eval mode."""

    def accepts(self, layer: Channelwise, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether examples come first and channels second; an unbatched InstanceNorm takes neither."""
        if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
            return dims == (0, 0) and x.dim() == layer._get_no_batch_dim() + 1  # type: ignore[no-untyped-call]
        return dims == (0, 0) and not layer.training and layer.running_mean is not None

    def gradients(self, layer: Channelwise, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return gain and shift gradients (n, channels)."""
        found = {}
        x, gy = at_least_single(x), at_least_single(gy)
        if "weight" in names:
            found["weight"] = _over_positions(gy * _normalized(layer, x))
        if "bias" in names:
            found["bias"] = _over_positions(gy)
        return found


def _normalized(layer: Channelwise, x: Tensor) -> Tensor:
    """Return the layer's normalised input, without gain and shift, and without touching its running statistics."""
    mean, variance = layer.running_mean, layer.running_var
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and (layer.training or mean is None):
        return F.instance_norm(x, eps=layer.eps)
    assert mean is not None
    assert variance is not None
    shape = (-1, *[1] * (x.dim() - 2))
    return (x - mean.view(shape)) * (variance + layer.eps).rsqrt().view(shape)


def _over_positions(values: Tensor) -> Tensor:
    """Sum (n, channels, ...) over all positions."""
    return values.reshape(len(values), values.shape[1], -1).sum(2)
