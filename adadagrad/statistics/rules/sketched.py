r"""A rule that sketches a weight's per-example gradients where their exact norms would cost a whole product.

With random signs w, shared by all examples of a layer, E |g_i w|^2 = |g_i|^2: a thin product in the place of a whole
one. The mean over k probes has a relative standard deviation of at most sqrt(2/(k rho)), rho = (tr M)^2 / |M|_F^2 the
effective rank of M = g_i^T g_i; exactly, one probe has the variance 2 (|M|_F^2 - sum_j M_jj^2) (derived). All examples
share the draw, so its error does not average over them.

Biases, and weights whose exact norms cost no more than the sketch, stay exact; so do inner products and everything that
needs the gradients themselves.

Source: Hutchinson (1990), A stochastic estimator of the trace (from memory, unverified (high)). Differs from the paper:
one draw is shared by all examples.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from typing import Any, Generic

from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule, Layer
from adadagrad.statistics.rules.per_example_sums import squares_per_example
from adadagrad.statistics.sketches import Sketches


class AbstractSketch(abc.ABC, Generic[Layer]):
    """How the weight gradients of a layer family are multiplied by random signs without being formed."""

    @abc.abstractmethod
    def pays(self, layer: Layer, x: Tensor, probes: int) -> bool:
        """Return whether k sketches of a call cost fewer flops than the exact norms.

        Args:
            layer: The module.
            x: Its input (n, ...).
            probes: k.
        """

    @abc.abstractmethod
    def shape(self, layer: Layer, probes: int) -> tuple[int, ...]:
        """Return the shape of the signs, probes first.

        Args:
            layer: The module.
            probes: k.
        """

    @abc.abstractmethod
    def examples(self, layer: Layer, x: Tensor, gy: Tensor, signs: Tensor) -> Tensor:
        """Return the sketches of every example's weight gradient.

        Args:
            layer: The module.
            x: Its input (n, ...).
            gy: Gradient of its output (n, ...).
            signs: -1 and 1, of `shape`.

        Returns:
            (n, k, m), in float32 at least.
        """

    @abc.abstractmethod
    def of_gradient(self, gradient: Tensor, signs: Tensor) -> Tensor:
        """Return the sketches of one gradient: what `examples` does to every example's.

        Args:
            gradient: Of the weight's shape.
            signs: -1 and 1, of `shape`.

        Returns:
            (k, m).
        """


class SketchedRule(AbstractRule[nn.Module]):
    """A layer's rule in a step that is sketched: its exact rule, but for the norms of a weight that `sketch` pays for.

    Args:
        name: Qualified name of the layer.
        exact: Its exact rule.
        sketch: Its sketch.
        sketches: Those of the measured step.
    """

    def __init__(self, name: str, exact: AbstractRule[Any], sketch: AbstractSketch[Any], sketches: Sketches) -> None:
        self._name, self._exact, self._sketch, self._sketches = name, exact, sketch, sketches

    def accepts(self, layer: nn.Module, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return what the exact rule says."""
        return self._exact.accepts(layer, x, dims)

    def gradients(self, layer: nn.Module, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the exact gradients."""
        return self._exact.gradients(layer, x, gy, names)

    def square_norms(self, layer: nn.Module, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms, of the weight by the mean over its sketches."""
        probes = self._sketches.probes
        if "weight" not in names or not self._sketch.pays(layer, x, probes):
            return self._exact.square_norms(layer, x, gy, names)
        signs = self._sketches.signs(self._name, self._sketch.shape(layer, probes), gy)
        rows = self._sketch.examples(layer, x, gy, signs)
        squares = squares_per_example(rows.reshape(len(x) * probes, -1)).view(len(x), probes)
        self._sketches.note(self._name, squares)
        total: Tensor = squares.mean(1)
        rest = set(names) - {"weight"}
        return total + self._exact.square_norms(layer, x, gy, rest) if rest else total

    def inner_products(self, layer: nn.Module, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return the exact products."""
        return self._exact.inner_products(layer, x, gy, directions)
