"""The sizes of a layer call that the cost model asks for, read off the layer and the shapes of one trial run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adadagrad.statistics.layer_costs import LayerSize
from adadagrad.statistics.rules import find_fused, find_sketch
from adadagrad.statistics.rules.base import own_parameters
from adadagrad.statistics.rules.convolution import has_few_channels
from adadagrad.statistics.rules.patch_gram import gram_cost, gram_is_cheaper
from adadagrad.statistics.rules.sketched_convolution import SMALL_PATCH

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose cost is that of a matrix product."""


def size_of_call(layer: nn.Module, x: Tensor, y: Tensor) -> LayerSize:
    """Return the sizes of a call of one input and one output.

    Args:
        layer: The module.
        x: Its input, a few examples.
        y: Its output.

    Returns:
        What one example takes.
    """
    is_product = isinstance(layer, PRODUCTS)
    channels = layer.weight.shape[0] if isinstance(layer, PRODUCTS) else 1
    rows = max(1, y.shape[0]) if y.dim() else 1
    positions = max(1, y.numel() // (rows * channels))
    activations = (x.numel() + y.numel()) // rows
    own = own_parameters(layer)
    weights = sum(p.numel() for p in own.values() if p.dim() > 1) if is_product else 0
    fused = find_fused(layer, patched=True)
    trainable = all(p is None or p.requires_grad for p in layer._parameters.values())
    products, formed, probe, thin = _norms(layer, x, positions) if weights and positions > 1 else (None, None, 0, 0)
    may_fuse = positions > 1 and trainable and fused is not None and fused.suits(layer, x)
    return LayerSize(weights, positions, activations, 0, products, formed, may_fuse, probe, thin)


def size_of_whole_call(layer: nn.Module, arguments: Sequence[Any], outputs: Sequence[Any], rows: int) -> LayerSize:
    """Return the sizes of a call of several tensors.

    Args:
        layer: The module.
        arguments: Its arguments, tensors and others.
        outputs: Its outputs, likewise.
        rows: Examples in this run.

    Returns:
        What one example takes.
    """
    inputs, made = (sum(v.numel() for v in vs if isinstance(v, Tensor)) for vs in (arguments, outputs))
    width = next((v.shape[-1] for v in outputs if isinstance(v, Tensor) and v.dim() > 1), 1)
    weights = sum(p.numel() for p in layer.parameters() if p.requires_grad and p.dim() > 1)
    if isinstance(layer, nn.EmbeddingBag):  # a table that is looked up multiplies nothing
        weights = 0
    positions, again = max(1, made // (rows * max(1, width))), int(not isinstance(layer, nn.Bilinear))
    return LayerSize(weights, positions, (inputs + made) // rows, again)


def _norms(layer: nn.Module, x: Tensor, positions: int) -> tuple[int | None, int | None, int, int]:
    """Return products and elements of the exact norms, and a probe's products: in all, and of a thin convolution."""
    if isinstance(layer, nn.Linear):
        d, p = layer.in_features, layer.out_features
        by_positions = positions * (d + p) < d * p
        exact = (positions**2 * (d + p), 2 * positions**2) if by_positions else (None, None)
        return *exact, 0 if find_sketch(layer, patched=True) is None else d + p, 0
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    d, p = layer.weight[0].numel(), layer.out_channels
    probe, thin = (
        (0, 0)
        if d <= SMALL_PATCH or find_sketch(layer, patched=True) is None
        else (d * layer.groups + p, d * layer.groups)
    )
    if isinstance(layer, nn.Conv2d) and gram_is_cheaper(layer, x) and (costs := gram_cost(layer, x)) is not None:
        assert not isinstance(layer.padding, str)
        height, width = (size + 2 * int(pad) for size, pad in zip(x.shape[2:], layer.padding, strict=True))
        return costs[0], (height * width) ** 2 + positions**2, probe, thin
    if has_few_channels(layer, x):  # its patches stay in the cache, and so count by half
        return None, layer.weight.numel() + d * positions // 2, probe, thin
    return None, None, probe, thin
