"""Batches as trees: walking them, naming a place in them, and building another of the same shape.

Branches are mappings, named tuples, dataclasses, and lists or tuples with a tensor or another branch among
their elements. Everything else is a leaf, and so is a list or tuple of plain objects: those are rows, one for
each example. (torch's own `_pytree` takes a list of strings for a branch, and a mapping that is no dict for a
leaf.)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from adadagrad.core.errors import BatchShapeError

ROWS = (list, tuple)
_BRANCHES_AND_TENSORS = (Tensor, list, tuple, Mapping)

Path = tuple[str, ...]


def leaf_name(path: Path) -> str:
    """Return how a leaf is written, for example ``batch['image'][0]``."""
    return "batch" + "".join(path)


def map_leaves(function: Callable[[Path, Sequence[Any]], Any], trees: Sequence[Any], path: Path = ()) -> Any:
    """Rebuild a tree from what a function returns for each place where the trees have a leaf.

    Args:
        function: Takes the leaf's path and that leaf of every tree.
        trees: At least one; all of one structure.
        path: Where in the whole batch the trees stand.

    Returns:
        A tree of the first one's structure.

    Raises:
        BatchShapeError: The trees' structures differ.
    """
    first = trees[0]
    if _is_leaf(first):
        return function(path, trees)
    parts = [_children(tree) for tree in trees]
    keys = parts[0].keys()
    if any(part.keys() != keys for part in parts):
        raise BatchShapeError(
            f"{leaf_name(path)} has the entries {list(keys)} in one chunk and others in the next: "
            f"let collate_fn return the same structure every time"
        )
    return _rebuild(first, {k: map_leaves(function, [part[k] for part in parts], (*path, k)) for k in keys})


def _is_leaf(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return True
    if isinstance(tree, ROWS):
        return bool(tree) and not _is_named(tree) and not any(_is_branch_or_tensor(x) for x in tree)
    return not _is_branch_or_tensor(tree)


def _is_branch_or_tensor(x: Any) -> bool:
    return isinstance(x, _BRANCHES_AND_TENSORS) or (dataclasses.is_dataclass(x) and not isinstance(x, type))


def _is_named(tree: Any) -> bool:
    return isinstance(tree, tuple) and getattr(tree, "_fields", None) is not None


def _children(tree: Any) -> dict[str, Any]:
    """Return a branch's parts by the way they are written behind its name; a leaf has none."""
    if isinstance(tree, Mapping):
        return {f"[{key!r}]": value for key, value in tree.items()}
    if _is_named(tree):
        return {f".{name}": value for name, value in zip(tree._fields, tree, strict=True)}
    if isinstance(tree, ROWS):
        return {f"[{i}]": value for i, value in enumerate(tree)}
    if _is_leaf(tree):
        return {}
    return {f".{field.name}": getattr(tree, field.name) for field in dataclasses.fields(tree)}


def _rebuild(like: Any, parts: dict[str, Any]) -> Any:
    values = list(parts.values())
    if type(like) is dict:
        return dict(zip(like, values, strict=True))
    if _is_named(like):
        return type(like)(*values)
    if isinstance(like, ROWS):
        return type(like)(values)
    if isinstance(like, Mapping) and not isinstance(like, MutableMapping):
        return type(like)(dict(zip(like, values, strict=True)))  # type: ignore[call-arg]
    new = copy.copy(like)
    if isinstance(new, MutableMapping):
        new.update(zip(like, values, strict=True))
        return new
    for field, value in zip(dataclasses.fields(like), values, strict=True):
        object.__setattr__(new, field.name, value)
    return new
