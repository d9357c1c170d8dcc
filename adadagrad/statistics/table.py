"""A parameter that is broadcast over the examples: its per-example gradients arrive as such, but for a view."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.per_example_sums import products_per_example, squares_per_example


class TableRule(AbstractRule[nn.Module]):
    """Exact rule for one use of such a parameter; the layer is not asked, the output gradient is the view's own.

    Args:
        end: The view of the parameter that was broadcast; None for the parameter itself.
        parameter: The parameter.
    """

    def __init__(self, end: GradientEdge | None, parameter: nn.Parameter) -> None:
        self._end, self._parameter = end, parameter

    def accepts(self, layer: nn.Module, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return True: the trial runs have found the examples."""
        return True

    def gradients(self, layer: nn.Module, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the gradients of the view, put in their places in the parameter."""
        return dict.fromkeys(names, through_views(gy, self._end, self._parameter))

    def square_norms(self, layer: nn.Module, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms, which a view does not change."""
        return squares_per_example(gy)

    def inner_products(self, layer: nn.Module, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return the products with the gradients."""
        (direction,) = directions.values()
        return products_per_example(through_views(gy, self._end, self._parameter), direction)


def through_views(gradients: Tensor, end: GradientEdge | None, source: nn.Parameter | GradientEdge) -> Tensor:
    """Take every example's gradient of a view back to the tensor that it is a view of.

    Args:
        gradients: (n, *shape of the view).
        end: The view; None for the tensor itself.
        source: The tensor.

    Returns:
        (n, *shape of the tensor).
    """
    if end is None:
        return gradients
    rows = gradients.to(end.node._input_metadata[end.output_nr].dtype)
    found: Tensor = torch.autograd.grad([end], [source], [rows], is_grads_batched=True)[0]  # type: ignore[arg-type]
    return found
