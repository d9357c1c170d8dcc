r"""LayerNorm, RMSNorm and GroupNorm: gain and shift act elementwise on the normalised input.

With xhat the normalised input, the gain's gradient of example i is the sum of gy_i * xhat_i over positions, the
shift's the sum of gy_i. These layers normalise each example alone, so per-example gradients exist (as they do
not for BatchNorm in training mode).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.per_example_sums import at_least_single, products_per_example
from adadagrad.statistics.rules.small import AbstractSmallRule

Normalization: TypeAlias = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm


class NormalizationRule(AbstractSmallRule[nn.LayerNorm | nn.RMSNorm | nn.GroupNorm]):
    """Exact rule for `torch.nn.LayerNorm`, `RMSNorm` and `GroupNorm`."""

    def accepts(self, layer: Normalization, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether each example is normalised alone."""
        if isinstance(layer, nn.GroupNorm):
            return dims == (0, 0)
        return dims[0] < x.dim() - len(layer.normalized_shape)

    def gradients(self, layer: Normalization, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return gain and shift gradients (n, *parameter shape)."""
        found = {}
        x, gy = at_least_single(x), at_least_single(gy)
        if "weight" in names:
            found["weight"] = _over_positions(layer, gy * _normalized(layer, x))
        if "bias" in names:
            found["bias"] = _over_positions(layer, gy)
        return found

    def inner_products(self, layer: Normalization, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <gy_i, the layer applied to x_i with the directions as gain and shift>."""
        if "weight" not in directions:
            return super().inner_products(layer, x, gy, directions)
        gain, shift = (None if v is None else at_least_single(v) for v in map(directions.get, ("weight", "bias")))
        return products_per_example(gy, _normalized(layer, at_least_single(x), gain, shift))


def _normalized(layer: Normalization, x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Return the layer's normalised input, by default without gain and shift."""
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, gain, shift, layer.eps)
    if isinstance(layer, nn.RMSNorm):
        return F.rms_norm(x, layer.normalized_shape, gain, layer.eps)
    return F.layer_norm(x, layer.normalized_shape, gain, shift, layer.eps)


def _over_positions(layer: Normalization, values: Tensor) -> Tensor:
    """Sum (n, ...) over all positions that share a parameter element."""
    if isinstance(layer, nn.GroupNorm):
        return values.reshape(len(values), values.shape[1], -1).sum(2)
    return values.reshape(len(values), -1, *layer.normalized_shape).sum(1)
