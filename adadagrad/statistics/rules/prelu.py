r"""PReLU: the slope multiplies the negative part of the input, so its gradient is the sum of gy * min(x, 0).

One slope for all elements, or one for each channel of the second dimension. Cost per example: 2 T p flop, T p numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule, at_least_single, dot_per_example, squares_per_example


class PReLURule(AbstractRule[nn.PReLU]):
    """Exact rule for `torch.nn.PReLU`."""

    def accepts(self, layer: nn.PReLU, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether the channels, if there are some, are the second dimension behind the examples."""
        return layer.num_parameters == 1 or (dims == (0, 0) and x.dim() > 1)

    def gradients(self, layer: nn.PReLU, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the slope's gradients (n, slopes)."""
        products = at_least_single(gy) * at_least_single(x).clamp(max=0)
        return dict.fromkeys(names, products.reshape(len(x), layer.num_parameters, -1).sum(2))

    def square_norms(self, layer: nn.PReLU, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms of the small gradients."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for gradient in self.gradients(layer, x, gy, names).values():
            total += squares_per_example(gradient)
        return total

    def inner_products(self, layer: nn.PReLU, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <gradient_i, direction> from the small per-example gradients themselves."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for name, gradient in self.gradients(layer, x, gy, set(directions)).items():
            total += dot_per_example(gradient, directions[name])
        return total
