"""What a rule is: how one call of one layer gives its share of every example's gradient."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.per_example_sums import weighted_squares

Layer = TypeVar("Layer", bound=nn.Module)


class AbstractRule(abc.ABC, Generic[Layer]):
    """Exact per-example statistics of a layer family, from a call's input and output gradient.

    Letters: n examples, x the layer's input (n, ...), gy the gradient of the loss with respect to the layer's
    output (n, ...), both with the examples first. `names` are the layer's own parameters that are wanted.
    The loss may weight example i by c_i; then everything here is of c_i g_i.
    """

    @abc.abstractmethod
    def accepts(self, layer: Layer, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether a call with its examples in these dimensions of input and output can be counted.

        Args:
            layer: The module that was called.
            x: Its input as it came, examples in ``dims[0]``.
            dims: Batch dimensions of input and output.

        Returns:
            False where a layer works along the dimension of the examples; the fallback then counts it.
        """

    @abc.abstractmethod
    def gradients(self, layer: Layer, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return every example's gradient of each wanted parameter, materialised.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            names: Wanted parameter names.

        Returns:
            name -> (n, *parameter shape).
        """

    @abc.abstractmethod
    def square_norms(self, layer: Layer, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        r"""Return \|g_i\|^2 summed over the wanted parameters.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            names: Wanted parameter names.

        Returns:
            float64 (n,) [grad^2].
        """

    @abc.abstractmethod
    def inner_products(self, layer: Layer, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <g_i, direction>, without forming any g_i.

        A layer that is linear in its parameters has <g_i, v> = <gy_i, the layer applied to x_i with v as its
        parameters>.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            directions: name -> tensor of the parameter's shape; only these parameters count.

        Returns:
            float64 (n,).
        """

    def square_sums(
        self, layer: Layer, x: Tensor, gy: Tensor, parameters: Mapping[str, Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        """Return sum_i w_i g_ij^2 of the wanted parameters, coordinate by coordinate.

        By default every example's gradient is formed, a few megabytes at a time: one more weight gradient.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            parameters: name -> parameter, for the wanted ones.
            weights: w_i >= 0, float64 (n,).

        Returns:
            name -> float64 tensor of the parameter's shape [grad^2]. In float32 each is within 2e-6 of itself, beside
            the rounding of the g_ij.
        """
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        for part in chunks(len(x), self.bytes_per_example(layer, x, gy, parameters), room(x)):
            for name, gradient in self.gradients(layer, x[part], gy[part], parameters.keys()).items():
                sums[name] += weighted_squares(gradient, weights[part])
        return sums

    def bytes_per_example(self, layer: Layer, x: Tensor, gy: Tensor, parameters: Mapping[str, Tensor]) -> int:
        """Return the bytes that `gradients` takes for one example.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            parameters: name -> parameter, for the wanted ones.
        """
        return sum(p.numel() for p in parameters.values()) * gy.element_size()


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable weight and bias of the module itself; rules know no other names (``weight_g``, say)."""
    own = layer._parameters
    found = ((name, own.get(name)) for name in ("weight", "bias"))
    return {name: p for name, p in found if p is not None and p.requires_grad}
