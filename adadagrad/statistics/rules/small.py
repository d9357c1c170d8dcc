"""Layers whose parameters are small beside their input: the gradients of all examples are formed at once.

A gain, a shift or a slope per channel has as many elements as one position has channels, so (n, channels) is nothing
beside the input (n, channels, positions), and norms and inner products are read off it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from adadagrad.statistics.rules.base import AbstractRule, Layer
from adadagrad.statistics.rules.per_example_sums import products_per_example, squares_per_example


class AbstractSmallRule(AbstractRule[Layer]):
    """A rule that has only to say what `gradients` are."""

    def square_norms(self, layer: Layer, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms of the gradients."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for gradient in self.gradients(layer, x, gy, names).values():
            total += squares_per_example(gradient)
        return total

    def inner_products(self, layer: Layer, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <gradient_i, direction> from the gradients themselves."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for name, gradient in self.gradients(layer, x, gy, set(directions)).items():
            total += products_per_example(gradient, directions[name])
        return total
