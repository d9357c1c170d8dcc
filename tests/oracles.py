"""Naive versions that the library is held against: slow, obvious, float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from adadagrad.core.records import GradientStatistics
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics.coordinate import reduce_ratio
from adadagrad.statistics.reference import statistics_from_units


def example_gradients(model: nn.Module, losses: Callable[[nn.Module], Tensor]) -> Tensor:
    """Return (n, d): the gradient of each entry of ``losses(model)`` with respect to all trainable parameters.

    One backward per example through the whole batch's graph: nothing is assumed about layers.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    values = losses(model)
    rows = []
    for value in values:
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        rows.append(torch.cat([piece.flatten() for piece in pieces]))
    return torch.stack(rows)


def naive_statistics(
    model: nn.Module, losses: Callable[[nn.Module], Tensor], coordinates: CoordinateReduction | None = None
) -> GradientStatistics:
    """Return the statistics of the loop over examples; blocks are the parameter tensors."""
    rows = example_gradients(model, losses).double()
    statistics = statistics_from_units(rows)
    if coordinates is None:
        return statistics
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    ratio = reduce_ratio(rows.var(0).split(sizes), rows.mean(0).split(sizes), coordinates)
    return replace(statistics, coordinate_ratio=ratio)


def relative_error(measured: float | None, expected: float | None) -> float:
    """Return |measured - expected| / |expected|; 0 where both are None or equal."""
    if measured is None or expected is None:
        assert measured is expected
        return 0.0
    return abs(measured - expected) / max(abs(expected), 1e-300) if measured != expected else 0.0
