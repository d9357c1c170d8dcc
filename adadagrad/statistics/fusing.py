r"""A layer's call whose weight gradient is formed example by example, so that the norms cost no second product.

``y = Fused.apply(x, leaf, call, deliver, *parameters)`` computes what the layer computes, bit for bit. Its backward
gives the input's and the parameters' gradients, the latter summed over examples here instead of inside one product
(within rounding of the ordinary ones: another order of summation), and the squared norms as the gradient of `leaf`.

The gradient never depends on whether a measurement succeeds: where the fused rule fails, or a second derivative is
wanted, the layer is run once more and autograd differentiates it in the ordinary way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.base import own_parameters
from adadagrad.statistics.rules.fused import AbstractFusedRule, ExampleGradients
from adadagrad.statistics.rules.per_example_sums import squares_per_example

Deliver = Callable[[Tensor, Tensor, "Tensor | None", float], "Tensor | None"]
"""Takes a call's input, output gradient, squared norms (None if there are none) and the seconds that these took;
returns the leaf's share."""


@dataclass(frozen=True, slots=True)
class FusedCall:
    """A call that a fused rule takes over.

    Args:
        layer: The module.
        rule: Its fused rule.
        parameters: Its parameters by name, all trainable, in the order in which they are handed to `Fused`.
    """

    layer: nn.Module
    rule: AbstractFusedRule[Any]
    parameters: dict[str, nn.Parameter]


class Fused(torch.autograd.Function):
    """One layer call, differentiated by its fused rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, call: FusedCall, deliver: Deliver, *parameters: Tensor) -> Tensor:
        """Return the layer's output.

        Args:
            ctx: Autograd's context.
            x: The layer's input (n, ...).
            leaf: The dummy leaf, float64 (n,).
            call: Layer and rule.
            deliver: What takes the statistic.
            *parameters: The layer's parameters, in the call's order.

        Returns:
            The output (n, ...).
        """
        y, saved = call.rule.forward(call.layer, x)
        if y._is_view():  # of a temporary: a view made in here could not be changed in place by what follows
            y = torch.ops.aten._unsafe_view(y, y.shape)
        ctx.save_for_backward(x, *saved)
        ctx.call, ctx.deliver = call, deliver
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        """Return the gradients of input, leaf and parameters.

        Args:
            ctx: Autograd's context.
            gy: Gradient of the loss with respect to the output.

        Returns:
            One entry for each argument of `forward`.
        """
        x, *saved = ctx.saved_tensors
        call, wants_x = ctx.call, ctx.needs_input_grad[0]
        dx, gradients, squares, seconds = None, None, None, 0.0
        if not torch.is_grad_enabled():
            try:
                dx, parts = call.rule.backward(call.layer, x, tuple(saved), gy, wants_x=wants_x)
                gradients, squares, seconds = _add_up(call, parts)
            except Exception:  # out of memory, most likely: the ordinary way needs less
                gradients = squares = None
        # What is kept of x must not hold its graph, which holds the taps, which hold what is kept.
        share = ctx.deliver(x.detach(), gy, squares, seconds)
        if gradients is None:
            dx, gradients = _ordinary(call, x, gy, wants_x=wants_x)
        return dx, share, None, None, *gradients


def fused_call(layer: nn.Module, rule: AbstractFusedRule[Any] | None, x: Tensor, leaf: Tensor) -> FusedCall | None:
    """Return how a call is taken over, or None where it is left to the layer.

    Args:
        layer: The module that is about to be called.
        rule: Its fused rule, if it has one.
        x: Its input.
        leaf: The dummy leaf, for the number of examples.
    """
    if rule is None or not torch.is_grad_enabled() or x.dim() < 3 or x.shape[:1] != leaf.shape:
        return None  # with one position per example there is nothing to fuse
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return None
    parameters = own_parameters(layer)
    if any(p.dtype != x.dtype or type(p) is not nn.Parameter for p in parameters.values()):
        return None
    for name in ("weight", "bias"):  # a parametrization takes the name away, a frozen one is not trainable
        if name not in layer._parameters or (layer._parameters[name] is not None and name not in parameters):
            return None
    return FusedCall(layer, rule, parameters) if rule.suits(layer, x) else None


def _add_up(call: FusedCall, parts: ExampleGradients) -> tuple[list[Tensor], Tensor, float]:
    """Return the parameters' gradients, every example's squared norm, and the seconds that the norms took."""
    sums: dict[str, Tensor] = {}
    pieces, seconds = [], 0.0
    for part in parts:
        squares: Tensor | None = None
        for name, gradient in part.items():
            started = time.perf_counter()
            own = squares_per_example(gradient)
            squares = own if squares is None else squares.add_(own)
            seconds += time.perf_counter() - started
            total = gradient.sum(0)
            sums[name] = sums[name].add_(total) if name in sums else total
        assert squares is not None
        pieces.append(squares)
    squares = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    return [sums[name].reshape(p.shape) for name, p in call.parameters.items()], squares, seconds


def _ordinary(call: FusedCall, x: Tensor, gy: Tensor, *, wants_x: bool) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of input and parameters as autograd computes them."""
    parameters = [getattr(call.layer, name) for name in call.parameters]
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = x if keep else x.detach().requires_grad_(wants_x)
        y, _ = call.rule.forward(call.layer, inputs)
        wanted = [*([inputs] if wants_x else []), *parameters]
        found = list(torch.autograd.grad(y, wanted, gy, create_graph=keep))
    return (found.pop(0) if wants_x else None), found
