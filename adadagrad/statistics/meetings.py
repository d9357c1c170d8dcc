"""Which shared tensors meet the examples by broadcasting, learnt from two trial runs with a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils._pytree import tree_leaves

from adadagrad.statistics.broadcast import CallKey, Meeting, Use, uses_of
from adadagrad.statistics.trials import grown_dim

Run = Callable[[list[int]], tuple[Any, dict[Node, tuple[CallKey, torch.Size]]]]
"""Runs the model with a graph on these rows of the batch; returns its output and the shared layers' nodes."""


def find_meetings(run: Run, parameters: Mapping[nn.Parameter, CallKey], m: int) -> dict[CallKey, tuple[Meeting, ...]]:
    """Return where shared tensors meet the examples, for those that do so wherever they are used.

    A dimension of the result that grows with the number of examples holds them. That row i is example i is seen
    from the gradients of one example's outputs at a time: they may not reach another row.

    Args:
        run: Runs the model.
        parameters: Parameters that no layer with a rule owns.
        m: Examples of the batch to try, besides copies.

    Returns:
        The meetings of each tensor; a tensor that is missing has none, or none that can be trusted.
    """
    short, nodes = run([*range(m), 0])
    longer, more_nodes = run([*range(m), 0, 0])
    uses, longer_uses = uses_of(short, nodes, parameters), uses_of(longer, more_nodes, parameters)
    found = {}
    for key, first in uses.items():
        meetings = _meetings(first, longer_uses.get(key, []), m + 1)
        if meetings is not None:
            found[key] = meetings
    pairs = [(key, pair) for key in found for pair in zip(uses[key], found[key], strict=True)]
    trusted = _in_order(short, [pair for _, pair in pairs], m + 1)
    wrong = {key for (key, _), right in zip(pairs, trusted, strict=True) if not right}
    return {key: meetings for key, meetings in found.items() if key not in wrong}


def _meetings(uses: Sequence[Use], longer: Sequence[Use], rows: int) -> tuple[Meeting, ...] | None:
    """Return the meetings of one tensor, None if a use does not grow by broadcasting from `rows` to one more."""
    if [use.kind for use in uses] != [use.kind for use in longer]:
        return None
    found = []
    for first, second in zip(uses, longer, strict=True):
        dim = grown_dim(first.result, second.result, rows)
        if dim is None or not first.broadcasts_over(dim):
            return None
        found.append(Meeting(first.kind, first.operand, dim))
    return tuple(found)


def _in_order(output: Any, uses: Sequence[tuple[Use, Meeting]], rows: int) -> list[bool]:
    """Return of every use whether its row i reaches output i and no other; False where no output has rows."""
    outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad and x.shape[:1] == (rows,)]
    if not outputs or not uses:
        return [False] * len(uses)
    answers = [True] * len(uses)
    edges = [GradientEdge(use.node, 0) for use, _ in uses]
    for i in range(rows):
        seeds = [torch.zeros_like(y) for y in outputs]
        for seed in seeds:
            seed[i] = torch.arange(seed[i].numel()).cos().reshape(seed[i].shape).to(seed)
        found = torch.autograd.grad(outputs, edges, seeds, retain_graph=True, allow_unused=True)
        for number, (gradient, (_, meeting)) in enumerate(zip(found, uses, strict=True)):
            if gradient is not None:
                others = gradient.movedim(meeting.dim, 0)[[row for row in range(rows) if row != i]]
                answers[number] &= not bool((others != 0).any())
    return answers
