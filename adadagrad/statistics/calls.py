"""Layer calls of a measured forward: who was called, where its examples are, and what its backward brought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules import AbstractRule
from adadagrad.statistics.rules.squaring import SquareSums

SEVERAL_BACKWARDS = (
    "several backward passes ran in one measured micro-batch: add the losses first, or measure one micro-batch for "
    "each forward and backward"
)

UNSEEN_PATH = "the model's forward took a path that has not been seen before"

NESTED = (
    "nested tensors cannot be measured example by example: give the model padded tensors with a mask, or use "
    "estimator=MicroBatch()"
)

CREATE_GRAPH = "a backward with create_graph=True cannot be measured: use MicroBatch()"


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One call of a layer whose examples are known.

    Args:
        name: Qualified name of the layer.
        layer: The module.
        rule: Its rule.
        parameters: Its trainable parameters that rules count, by their name in the layer.
        dims: Batch dimensions of input and output.
        square_sums: Sums over the examples that a fused rule adds up in the backward; empty otherwise.
    """

    name: str
    layer: nn.Module
    rule: AbstractRule[Any]
    parameters: dict[str, nn.Parameter]
    dims: tuple[int, int]
    square_sums: SquareSums = field(default_factory=SquareSums)


@dataclass(frozen=True, slots=True, eq=False)
class KeptCall:
    """A layer call with its input and output gradient, kept until they are no longer needed.

    Args:
        call: The layer call.
        x: Input, examples first (n, ...).
        gy: Output gradient, examples first (n, ...).
        names: The parameters whose squares have not been delivered through the leaf.
    """

    call: LayerCall
    x: Tensor
    gy: Tensor
    names: frozenset[str]

    def inner_products(self, directions: Mapping[nn.Parameter, Tensor]) -> Tensor | None:
        """Return <c_i g_i, direction> of this call, float64 (n,).

        Args:
            directions: Parameter -> tensor of its shape; only the call's parameters among them count.

        Returns:
            The products, None if none of the parameters is the call's.
        """
        wanted = {name: directions[p] for name, p in self.call.parameters.items() if p in directions}
        if not wanted:
            return None
        size = 1.0
        if self.gy.dtype == torch.float16:  # a gradient's elements can be too small for float16
            size = max(float(v.abs().amax()) for v in wanted.values()) or 1.0
        scaled = {name: (v / size if size != 1.0 else v).to(self.gy.dtype) for name, v in wanted.items()}
        return self.call.rule.inner_products(self.call.layer, self.x, self.gy, scaled) * size


def input_to_keep(x: Tensor, y: Tensor, call: LayerCall | None) -> Tensor:
    """Return what a tap keeps of a call's input until the backward.

    Args:
        x: The input.
        y: The output.
        call: The call, None if its examples are not known.

    Returns:
        The input in the output's precision where that is coarser (autocast computes with that copy, and the
        original may change in place); a stand-in without memory where only its shape will be needed.
    """
    x = x.detach()
    if call is None or "weight" not in call.parameters:
        return x.new_zeros(()).expand(x.shape)
    if x.dtype != y.dtype and x.is_floating_point() and torch.finfo(x.dtype).eps < torch.finfo(y.dtype).eps:
        return x.to(y.dtype)
    return x


def in_backward() -> bool:
    """Return whether autograd is running a backward in this thread, as activation checkpointing asks it too."""
    return torch._C._current_graph_task_id() != -1
