r"""Where a tensor that all examples share meets them by broadcasting, read off the graph that autograd made.

A table of positions, a class token or a shift per channel has no batch dimension; broadcasting gives it one, and its
gradient comes back already summed over the examples. But the operation that broadcasts still receives a gradient
with one row per example. The walk follows a tensor from its node through views of it to every such operation; the
gradient that arrives there, summed over the other broadcast dimensions alone and taken back through the views, is
the gradient of every example. The forward runs as it always does: nothing is expanded, rerun or drawn again, so
dropout does no harm.

Exact where every path of the tensor to the model's outputs leads through such an operation. Whether the rows there
are the examples, in order, the trial runs find out (`calibration.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils._pytree import tree_leaves

CallKey: TypeAlias = tuple[str, int]
"""A module's qualified name and the number of its call within one forward of the model, from 0."""

RAW = -2
"""In the place of a call number: a parameter by its qualified name, which no layer with a rule owns."""

VIEWS = frozenset({
    *("Alias", "Clone", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "T", "ToCopy", "Transpose"),
    *("UnsafeView", "Unsqueeze", "View"),
})
"""Operations that only put elements elsewhere. They save no tensors, so that they can be gone back through once the
backward has freed the graph, and they keep the norm of a gradient that goes back through them."""

BROADCASTS = frozenset({"Add", "Expand", "Repeat", "Sub"})
"""Operations whose operand may be smaller than their result, and whose gradient needs no saved tensor. A product does:
to look at what it saved a second time is an error inside a checkpoint."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """What is remembered, from the trial runs to later forwards, of one place where a shared tensor meets the examples.

    Args:
        kind: The operation.
        operand: Which of its operands the tensor is.
        dim: The batch dimension of its result.
    """

    kind: str
    operand: int
    dim: int


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One such place in one graph.

    Args:
        node: The operation's node.
        operand: Which operand the tensor is.
        end: The last view before it; None where the operand is the tensor itself.
        shape: The operand's shape.
    """

    node: Node
    operand: int
    end: GradientEdge | None
    shape: torch.Size

    @property
    def kind(self) -> str:
        """The operation."""
        return _kind(self.node)

    @property
    def result(self) -> torch.Size:
        """Shape of the operation's result."""
        return torch.Size(self.node._input_metadata[0].shape)

    def broadcasts_over(self, dim: int) -> bool:
        """Return whether the operand has no extent in this dimension of the result, and fits in the others."""
        result, padded = self.result, self._padded()
        return padded[dim] == 1 and all(own in (1, size) for own, size in zip(padded, result, strict=True))

    def per_example(self, gradient: Tensor, dim: int) -> Tensor:
        """Return the operand's gradient for every example.

        Args:
            gradient: Gradient of the operation's result, examples in `dim`.
            dim: The batch dimension.

        Returns:
            (n, *operand shape), in the gradient's precision.
        """
        node: Any = self.node
        if self.kind in {"Add", "Sub"} and self.operand == 1:
            factor = node._saved_alpha if self.kind == "Add" else -node._saved_alpha
            gradient = gradient if factor == 1 else gradient * factor
        rest = [size for number, size in enumerate(self._padded()) if number != dim]
        rows = gradient.movedim(dim, 0)
        found = rows.sum_to_size(len(rows), *rest).reshape(len(rows), *self.shape)
        return found.clone() if len(rows) == 1 else found  # autograd may take this very memory for `.grad`

    def _padded(self) -> list[int]:
        return [1] * (len(self.result) - len(self.shape)) + list(self.shape)


def uses_of(
    output: Any, nodes: Mapping[Node, tuple[CallKey, torch.Size]], parameters: Mapping[nn.Parameter, CallKey]
) -> dict[CallKey, list[Use]]:
    """Find every place where shared tensors meet something larger, in an order that depends on the graph alone.

    Args:
        output: What the model returned.
        nodes: Node of each shared layer's output -> its key and shape.
        parameters: Parameter -> its key.

    Returns:
        The uses of each tensor that has some, and none but such.
    """
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    returned = {id(leaf) for leaf in leaves}
    ends = [leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None]
    consumers: dict[Node, list[tuple[Node, int, int]]] = defaultdict(list)
    sources = dict(nodes)
    seen, pending = set(ends), ends[::-1]
    while pending:
        node = pending.pop()
        if node.name().endswith("AccumulateGrad"):
            p = node.variable  # type: ignore[attr-defined]
            if p in parameters and id(p) not in returned:
                sources[node] = (parameters[p], p.shape)
        for operand, (child, number) in enumerate(node.next_functions):
            if child is None:
                continue
            consumers[child].append((node, operand, number))
            if child not in seen:
                seen.add(child)
                pending.append(child)
    found = {}
    for node, (key, shape) in sources.items():
        uses = None if node in ends else _follow(node, shape, consumers, set(ends))
        if uses:
            found[key] = uses
    return found


def _follow(
    source: Node, shape: torch.Size, consumers: Mapping[Node, Iterable[tuple[Node, int, int]]], ends: set[Node]
) -> list[Use] | None:
    """Return where a tensor and its views are used; None if one is used otherwise, or returned."""
    uses: list[Use] = []
    pending: list[tuple[Node, int, torch.Size]] = [(source, 0, shape)]
    while pending:
        node, number, size = pending.pop()
        for consumer, operand, _ in consumers.get(node, ()):
            kind = _kind(consumer)
            if kind in BROADCASTS:
                end = None if node is source else GradientEdge(node, number)
                uses.append(Use(consumer, operand, end, size))
            elif kind in VIEWS and consumer not in ends:
                pending.append((consumer, 0, torch.Size(consumer._input_metadata[0].shape)))
            else:
                return None
    return uses


def _kind(node: Node) -> str:
    """Return an operation's name, "Slice" for SliceBackward0."""
    return node.name().rstrip("0123456789").removesuffix("Backward")
