"""What a fused rule is: a layer's weight gradient, formed example by example and added up.

A layer with several positions per example forms, for its ordinary weight gradient, the sum over examples of products
that `AbstractRule.square_norms` would form again. A fused rule forms each example's product once; `fusing.py` takes its
norm and adds it to the sum, so that the flops are paid once. The gradient is the ordinary one in another order of
summation.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Generic, TypeAlias

from torch import Tensor

from adadagrad.statistics.rules.base import Layer

ExampleGradients: TypeAlias = Iterator[dict[str, Tensor]]
"""name -> (m, *parameter shape), or any shape of as many elements, for the next m examples, until all n have come;
tensors hold only until the next ones are asked for."""


class AbstractFusedRule(abc.ABC, Generic[Layer]):
    """Forward and backward of a layer family whose weight gradient is formed example by example.

    All parameters of the layer are trainable, examples come first (n, ...) in input and output, and all tensors have
    one precision; `suits` need not check that.
    """

    @abc.abstractmethod
    def suits(self, layer: Layer, x: Tensor) -> bool:
        """Return whether fusing is exact and the faster way for this call.

        Args:
            layer: The module that is about to be called.
            x: Its input (n, ...).
        """

    def can(self, layer: Layer, x: Tensor) -> bool:
        """Return whether fusing is exact for this call, also where norms alone are had for less; by default `suits`.

        Args:
            layer: The module that is about to be called.
            x: Its input (n, ...).
        """
        return self.suits(layer, x)

    @abc.abstractmethod
    def forward(self, layer: Layer, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the layer's output, bit for bit, and what the backward needs beside the input.

        Args:
            layer: The module.
            x: Its input (n, ...).
        """

    @abc.abstractmethod
    def backward(
        self, layer: Layer, x: Tensor, saved: tuple[Tensor, ...], gy: Tensor, *, wants_x: bool
    ) -> tuple[Tensor | None, ExampleGradients]:
        """Return the gradient of the input, and every example's gradient of every parameter.

        Args:
            layer: The module.
            x: Its input (n, ...).
            saved: What `forward` returned for it.
            gy: Gradient of the loss with respect to its output (n, ...).
            wants_x: Whether the input's gradient is wanted; None is returned where it is not.
        """
