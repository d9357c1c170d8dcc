r"""PReLU: the slope multiplies the negative part of the input, so its gradient is the sum of gy * min(x, 0).

One slope for all elements, or one for each channel of the second dimension. Cost per example: 2 T p flop, T p numbers.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from adadagrad.statistics.rules.per_example_sums import at_least_single
from adadagrad.statistics.rules.small import AbstractSmallRule


class PReLURule(AbstractSmallRule[nn.PReLU]):
    """Exact rule for `torch.nn.PReLU`."""

    def accepts(self, layer: nn.PReLU, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether the channels, if there are some, are the second dimension behind the examples."""
        return layer.num_parameters == 1 or (dims == (0, 0) and x.dim() > 1)

    def gradients(self, layer: nn.PReLU, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the slope's gradients (n, slopes)."""
        products = at_least_single(gy) * at_least_single(x).clamp(max=0)
        return dict.fromkeys(names, products.reshape(len(x), layer.num_parameters, -1).sum(2))
