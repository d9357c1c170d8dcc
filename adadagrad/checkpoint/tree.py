"""What is sharded over ranks, taken out of nested dicts and lists by its path, and put back where it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adadagrad.core.shards import is_sharded

Like: TypeAlias = Callable[[str], Tensor | None]
"""Given the path of a saved tensor, returns one that lies on ranks as the loaded one shall; None for a whole one."""

MARK = "sharded tensor"
"""Key of a dict that stands in the place of a tensor."""


def has_shards(content: Any) -> bool:
    """Return whether a DTensor is anywhere in nested dicts and lists."""
    if isinstance(content, dict):
        return any(has_shards(value) for value in content.values())
    if isinstance(content, list | tuple):
        return any(has_shards(value) for value in content)
    return isinstance(content, Tensor) and is_sharded(content)


def take_out(content: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Part what is sharded from what is not.

    Args:
        content: Nested dicts and lists.
        path: Where it stands itself.

    Returns:
        The same with a mark in the place of every DTensor; and the DTensors by path, keys joined by ``/``.
    """
    if isinstance(content, dict):
        pairs = {key: take_out(value, f"{path}/{key}") for key, value in content.items()}
        return {key: rest for key, (rest, _) in pairs.items()}, _merged(found for _, found in pairs.values())
    if isinstance(content, list | tuple):
        parts = [take_out(value, f"{path}/{index}") for index, value in enumerate(content)]
        return [rest for rest, _ in parts], _merged(found for _, found in parts)
    if isinstance(content, Tensor) and is_sharded(content):
        mark = {MARK: path, "shape": list(content.shape), "dtype": str(content.dtype).removeprefix("torch.")}
        return mark, {path: content.detach()}
    return content, {}


def put_in(rest: Any, like: Like) -> tuple[Any, dict[str, Tensor]]:
    """Make room for what is to be read where the marks stand.

    Args:
        rest: What `take_out` left.
        like: How the tensors shall lie on ranks.

    Returns:
        Nested dicts and lists with tensors of zeros in the place of marks; and those tensors by path.
    """
    if isinstance(rest, dict):
        if MARK in rest:
            tensor = _empty(rest[MARK], rest["shape"], getattr(torch, rest["dtype"]), like)
            return tensor, {rest[MARK]: tensor}
        pairs = {key: put_in(value, like) for key, value in rest.items()}
        return {key: value for key, (value, _) in pairs.items()}, _merged(found for _, found in pairs.values())
    if isinstance(rest, list):
        parts = [put_in(value, like) for value in rest]
        return [value for value, _ in parts], _merged(found for _, found in parts)
    return rest, {}


def _empty(path: str, shape: list[int], dtype: torch.dtype, like: Like) -> Tensor:
    other = like(path)
    if other is not None and list(other.shape) == shape:
        return torch.zeros_like(other, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype)


def _merged(parts: Any) -> dict[str, Tensor]:
    return {key: value for part in parts for key, value in part.items()}
