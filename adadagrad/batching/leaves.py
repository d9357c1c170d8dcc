"""What a collated batch is made of, and how to cut and join it without knowing what it means.

The leaves of a batch (`trees` says what its branches are) are

- tensors, whose first dimension counts the examples;
- rows: lists or tuples with one plain object an example (strings, paths, numbers), as `default_collate`
  makes of strings;
- constants: None, booleans, strings and bytes. They go with every part of the batch, and two batches can be
  joined only where they are equal.

Anything else is refused. So is a bare number: one that counts a chunk's tokens would be wrong for its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adadagrad.batching.trees import ROWS, Path, leaf_name, map_leaves
from adadagrad.core.errors import BatchShapeError

_CONSTANTS = (type(None), bool, str, bytes)
_REMEDY = "let collate_fn return tensors, or lists of plain objects, whose first dimension counts the examples"


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Take the examples from `start` to `stop` - 1 out of a batch, without copying a tensor.

    Args:
        batch: A tree whose leaves `check_batch` accepts.
        start: First example.
        stop: One after the last example.

    Returns:
        A tree of the same kind; its tensors are views.
    """

    def cut(path: Path, leaves: Sequence[Any]) -> Any:
        leaf = leaves[0]
        if isinstance(leaf, Tensor):
            return leaf.narrow(0, start, stop - start)
        return leaf[start:stop] if isinstance(leaf, ROWS) else leaf

    return map_leaves(cut, (batch,))


def join_batches(batches: Sequence[Any]) -> Any:
    """Put batches behind one another along their first dimension.

    Args:
        batches: Trees of the same structure, whose leaves `check_batch` accepts.

    Returns:
        A tree of the same kind with new tensors, pinned where the first batch's tensors are.
    """
    return map_leaves(_join, batches)


def check_batch(batch: Any, size: int) -> None:
    """Require a batch to hold exactly `size` examples in every leaf, so that it can be cut anywhere.

    Args:
        batch: What a collate function returned.
        size: Examples that it was made of.

    Raises:
        BatchShapeError: A leaf has another length, no length, or a type that cannot be cut, and is named; or no
            leaf counts examples.
    """
    counted = False

    def check(path: Path, leaves: Sequence[Any]) -> None:
        nonlocal counted
        leaf = leaves[0]
        if isinstance(leaf, _CONSTANTS):
            return
        length = _length(path, leaf)
        if length != size:
            raise BatchShapeError(
                f"{leaf_name(path)} has {length} rows ({_describe(leaf)}) in a chunk of {size} examples, so it "
                f"cannot be cut into exact batches: {_REMEDY}; drop unwanted examples in the "
                f"data set, not in collate_fn"
            )
        counted = True

    map_leaves(check, (batch,))
    if not counted:
        raise BatchShapeError(f"collate_fn returned {batch!r:.80} for {size} examples, without a tensor: {_REMEDY}")


def batch_lengths(batch: Any) -> dict[str, int]:
    """Return the number of rows of every leaf that has rows, by the leaf's name.

    Args:
        batch: A tree whose leaves are tensors, rows or constants.

    Returns:
        For example ``{"batch['image']": 8, "batch['label']": 8}``.
    """
    lengths: dict[str, int] = {}

    def note(path: Path, leaves: Sequence[Any]) -> None:
        if not isinstance(leaves[0], _CONSTANTS):
            lengths[leaf_name(path)] = _length(path, leaves[0])

    map_leaves(note, (batch,))
    return lengths


def _join(path: Path, leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if any(type(leaf) is not type(first) for leaf in leaves):
        kinds = " and ".join(sorted({type(leaf).__name__ for leaf in leaves}))
        raise BatchShapeError(f"{leaf_name(path)} is of different types in neighbouring chunks, {kinds}: {_REMEDY}")
    if isinstance(first, Tensor):
        return _join_tensors(path, leaves)
    if isinstance(first, ROWS):
        return type(first)(chain.from_iterable(leaves))
    if any(leaf != first for leaf in leaves):
        values = " and ".join(repr(leaf) for leaf in leaves)
        raise BatchShapeError(f"{leaf_name(path)} differs between neighbouring chunks, {values}: {_REMEDY}")
    return first


def _join_tensors(path: Path, tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    for other in tensors[1:]:
        if other.shape[1:] != first.shape[1:] or other.dtype != first.dtype:
            raise BatchShapeError(
                f"{leaf_name(path)} is {_describe(first)} in one chunk and {_describe(other)} in the next, so one "
                f"batch cannot hold both: pad to a fixed length in collate_fn (only a micro-batch that is "
                f"exactly one chunk of micro_batch_size examples is never joined)"
            )
    if not first.is_pinned():
        return torch.cat(list(tensors))
    shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
    return torch.cat(list(tensors), out=torch.empty(shape, dtype=first.dtype, pin_memory=True))


def _length(path: Path, leaf: Any) -> int:
    if isinstance(leaf, ROWS):
        return len(leaf)
    if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.layout is torch.strided and not leaf.is_nested:
        return leaf.shape[0]
    raise BatchShapeError(f"{leaf_name(path)} ({_describe(leaf)}) has no dimension that counts examples: {_REMEDY}")


def _describe(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return f"{type(leaf).__module__}.{type(leaf).__qualname__}".removeprefix("builtins.")
    if leaf.is_nested or leaf.layout is not torch.strided:
        return f"{'nested' if leaf.is_nested else leaf.layout} tensor"
    return f"{str(leaf.dtype).removeprefix('torch.')} tensor of shape {tuple(leaf.shape)}"
