"""A fused rule whose gradients are also squared and added over the examples, while they are in the cache.

A fused rule forms every example's gradient to add it to the trained one. The coordinate-wise sums need the squares of
the same gradients, so that they cost two passes over some megabytes and no product at all.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.fused import AbstractFusedRule, ExampleGradients
from adadagrad.statistics.rules.per_example_sums import weighted_squares


@dataclass(slots=True, eq=False)
class SquareSums:
    """What the backward of one fused call has added up.

    Args:
        totals: name -> sum_i (c_i g_ij)^2, float64 of the parameter's shape; empty until all examples have come.
        seconds: Time that this took.
    """

    totals: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


class Squaring(AbstractFusedRule[nn.Module]):
    """Another fused rule, with the squares of its gradients added up as they come.

    Args:
        rule: The fused rule.
        sums: Where the sums go, once all examples have come.
    """

    def __init__(self, rule: AbstractFusedRule[Any], sums: SquareSums) -> None:
        self._rule, self._sums = rule, sums

    def suits(self, layer: nn.Module, x: Tensor) -> bool:
        """Return whether the rule is exact: the squares need every gradient, so nothing else is the faster way."""
        return self._rule.can(layer, x)

    def forward(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the rule returns."""
        return self._rule.forward(layer, x)

    def backward(
        self, layer: nn.Module, x: Tensor, saved: tuple[Tensor, ...], gy: Tensor, *, wants_x: bool
    ) -> tuple[Tensor | None, ExampleGradients]:
        """Return what the rule returns; the gradients are squared when they are asked for."""
        dx, parts = self._rule.backward(layer, x, saved, gy, wants_x=wants_x)
        return dx, self._squared(layer, parts)

    def _squared(self, layer: nn.Module, parts: ExampleGradients) -> ExampleGradients:
        totals: dict[str, Tensor] = {}
        for part in parts:
            started = time.perf_counter()
            for name, gradient in part.items():
                found = weighted_squares(gradient, torch.ones(len(gradient), device=gradient.device))
                totals[name] = totals[name].add_(found) if name in totals else found
            self._sums.seconds += time.perf_counter() - started
            yield part
        self._sums.totals.update({name: total.view_as(getattr(layer, name)) for name, total in totals.items()})
