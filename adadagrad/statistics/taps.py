r"""How a statistic leaves the backward: the tap, an identity whose dummy leaf receives the statistic.

After a measured layer, ``y = Tap.apply(y, x, leaf, collect)``. Forward is the identity. Backward passes the
output gradient through untouched and returns ``collect(x, grad_y)`` as the gradient of `leaf`; autograd adds
these over all layers, so that after the backward ``leaf.grad`` holds the sum. The numbers live in the graph and
die with it: no module hooks, no state on modules, right in front of in-place activations.

This is the one place of the library where anything is patched: `patched` sets an attribute (`forward`, and what
`compiled.py` asks for) on module instances and takes it off again, also on error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Collect = Callable[[Tensor | None, Tensor], Tensor | None]
"""Takes a call's input (None if it was changed in place since) and output gradient; returns this layer's share of
the leaf's gradient, or None. Must not raise, and must not build a graph."""

CollectMany = Callable[[tuple[Tensor | None, ...]], Tensor | None]
"""The same for a call of several outputs, given their gradients."""

Forward = Callable[..., Any]


class Tap(torch.autograd.Function):
    """Identity on y whose backward gives ``collect(x, dL/dy)`` as the gradient of a dummy leaf."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, leaf: Tensor, collect: Collect) -> Tensor:
        """Return y itself.

        Args:
            ctx: Autograd's context.
            y: The layer's output, any shape; marked dirty, so that an in-place activation may follow.
            x: The layer's detached input, kept for the backward (the layer keeps it anyway), or a stand-in of its
                shape where only the shape is needed.
            leaf: The dummy leaf, float64 (n,).
            collect: What turns input and output gradient into the statistic.

        Returns:
            y.
        """
        ctx.save_for_backward(x)
        ctx.collect = collect
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        """Pass the gradient through and deliver the statistic, which is a constant to any second derivative.

        Args:
            ctx: Autograd's context.
            grad_y: Gradient of the loss with respect to y, the shape of y.

        Returns:
            grad_y untouched for y, the statistic for the leaf.
        """
        try:
            (x,) = ctx.saved_tensors
        except RuntimeError:  # changed in place: the layer itself had no need of it, so training goes on
            x = None
        return grad_y, None, ctx.collect(x, grad_y), None


class ManyTap(torch.autograd.Function):
    """Copies of several outputs, whose backward gives ``collect(their gradients)`` as the gradient of a dummy leaf.

    A layer of any kind may need its outputs for its own backward, or return views of one another, so that they cannot
    be marked as changed in place; a copy may be followed by an in-place activation. Nothing is saved with autograd, so
    that activation checkpointing sees the same saved tensors with and without this tap.
    """

    @staticmethod
    def forward(ctx: Any, collect: CollectMany, leaf: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        """Return the copies.

        Args:
            ctx: Autograd's context.
            collect: What turns output gradients into the statistic.
            leaf: The dummy leaf, float64 (n,).
            *outputs: The outputs, any shapes.

        Returns:
            As many tensors.
        """
        ctx.set_materialize_grads(False)
        ctx.collect = collect
        return tuple(y.clone() for y in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Pass the gradients through and deliver the statistic, a constant to any second derivative.

        Args:
            ctx: Autograd's context.
            *gradients: Gradients of the loss with respect to the outputs, None for those it does not use.

        Returns:
            Nothing for `collect`, the statistic for the leaf, the gradients untouched.
        """
        return None, ctx.collect(gradients), *gradients


@contextmanager
def patched(attribute: str, values: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Set an attribute on module instances, and restore every one, also on error.

    Args:
        attribute: Its name, one that modules have from their class too.
        values: The new value for each module.

    Yields:
        Nothing; the patch holds inside the context.
    """
    previous: dict[nn.Module, Any] = {}
    try:
        for module, value in values.items():
            previous[module] = module.__dict__.get(attribute)
            module.__dict__[attribute] = value
        yield
    finally:
        for module, old in previous.items():
            if old is None:
                module.__dict__.pop(attribute, None)
            else:
                module.__dict__[attribute] = old


def patched_forwards(forwards: Mapping[nn.Module, Forward]) -> AbstractContextManager[None]:
    """Replace `forward` on module instances, and restore every one, also on error.

    Args:
        forwards: The new forward of each module.

    Returns:
        A context in which the patch holds.
    """
    return patched("forward", forwards)
