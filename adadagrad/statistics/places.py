"""Where the examples are in a call of several tensors: the batch dimension of each argument and output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adadagrad.statistics.broadcast import CallKey
from adadagrad.statistics.trials import Fingerprint, grown_dim

SHARED = -1
"""In the place of a dimension: all examples share this tensor, or it is no tensor at all."""

UNKNOWN = -2
"""In the place of a dimension: a tensor that grows with the examples, or changes with one of them, in another way."""

Dims: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""A dimension for each argument and each output."""


@dataclass(slots=True)
class Places:
    """What the trial runs found; calls of earlier trial runs stay known.

    Args:
        dims: Of every call; None for one that cannot be taken apart into examples.
    """

    dims: dict[CallKey, Dims | None] = field(default_factory=dict)

    def find(self, key: CallKey, arguments: Sequence[Any], outputs: Sequence[Any], n: int) -> Dims | None:
        """Return where the examples of a call are.

        Args:
            key: Name and call number.
            arguments: Its arguments.
            outputs: Its outputs.
            n: Examples in this forward.

        Returns:
            The dimensions, None for a call that cannot be taken apart.

        Raises:
            KeyError: The trial runs did not see this call, or saw it with other dimensions.
        """
        dims = self.dims[key]
        if dims is None:
            return None
        if not all(_fits(*pair, n) for pair in zip((arguments, outputs), dims, strict=True)):
            raise KeyError(key)
        return dims

    def state(self) -> list[list[Any]]:
        """Return the dimensions as plain lists."""
        return [[*key, dims and [list(part) for part in dims]] for key, dims in self.dims.items()]

    def take(self, state: Sequence[Sequence[Any]]) -> None:
        """Take over what `state` returned.

        Args:
            state: The plain lists.
        """
        for name, index, dims in state:
            self.dims[name, index] = None if dims is None else (tuple(dims[0]), tuple(dims[1]))


def first_dims(arguments: Sequence[Any], outputs: Sequence[Any], n: int) -> Dims:
    """Return the dimensions where the first one of n rows is taken for the batch, without trial runs."""

    def dims(values: Sequence[Any]) -> tuple[int, ...]:
        return tuple(0 if isinstance(v, Tensor) and v.shape[:1] == (n,) else SHARED for v in values)

    return dims(arguments), dims(outputs)


def _fits(values: Sequence[Any], dims: Sequence[int], n: int) -> bool:
    """Whether every value has n rows where the examples are supposed to be."""
    if len(values) != len(dims):
        return False
    pairs = [(v, dim) for v, dim in zip(values, dims, strict=True) if dim >= 0]
    return all(isinstance(v, Tensor) and dim < v.dim() and v.shape[dim] == n for v, dim in pairs)


@dataclass(frozen=True, slots=True)
class _Seen:
    """One tensor of one trial run: its shape, its rows in brief along each dimension that may hold the examples."""

    shape: torch.Size
    rows: dict[int, Fingerprint]
    whole: Fingerprint

    @classmethod
    def of(cls, value: Any, rows: int) -> _Seen | None:
        if not isinstance(value, Tensor):
            return None
        x = torch.view_as_real(value) if value.is_complex() else value
        prints = {dim: Fingerprint.of(x, dim) for dim, size in enumerate(value.shape) if size == rows and x.numel()}
        return cls(value.shape, prints, Fingerprint.of(x.reshape(1, -1), 0))


_Call: TypeAlias = tuple[list[_Seen | None], list[_Seen | None]]


class PlaceTrials:
    """The calls of several tensors in the trial runs before one forward."""

    def __init__(self) -> None:
        self._runs: list[dict[CallKey, _Call]] = []

    def start_run(self) -> None:
        """Say that the calls of another trial run follow."""
        self._runs.append({})

    def note(self, key: CallKey, arguments: Sequence[Any], outputs: Sequence[Any], rows: int) -> None:
        """Take in one call of a trial run.

        Args:
            key: Name and call number.
            arguments: Its arguments, tensors and others.
            outputs: Its outputs, likewise.
            rows: Examples in this run.
        """
        if self._runs:  # the runs with a graph, which come later, are not asked
            self._runs[-1][key] = [_Seen.of(v, rows) for v in arguments], [_Seen.of(v, rows) for v in outputs]

    def conclude(self, m: int) -> dict[CallKey, Dims | None]:
        """Conclude from the runs on m + 1 examples, on m + 1 of which the last is another, and on m + 2.

        Args:
            m: Examples that all runs begin with.

        Returns:
            The dimensions of every call that they saw, as `Places` holds them.
        """
        runs, self._runs = self._runs, []
        dims: dict[CallKey, Dims | None] = {}
        first, longer = runs[0], runs[-1]
        counts, longer_counts = (Counter(name for name, _ in run) for run in (first, longer))
        for key in first.keys() | longer.keys():
            if counts[key[0]] != longer_counts[key[0]]:
                dims[key] = None
                continue
            changed = runs[1].get(key) if len(runs) > 2 else first[key]
            dims[key] = None if changed is None else _dims(first[key], changed, longer[key], m)
        return dims


def _dims(first: _Call, changed: _Call, longer: _Call, m: int) -> Dims | None:
    found = []
    for a, b, c in zip(first, changed, longer, strict=True):
        if not len(a) == len(b) == len(c):
            return None
        found.append(tuple(_dim(*seen, m) for seen in zip(a, b, c, strict=True)))
    return found[0], found[1]


def _dim(first: _Seen | None, changed: _Seen | None, longer: _Seen | None, m: int) -> int:
    """Return one tensor's batch dimension, or that it is shared, or neither."""
    if first is None or changed is None or longer is None:
        return SHARED if first is changed is longer else UNKNOWN
    if first.shape != changed.shape:
        return UNKNOWN
    if first.shape == longer.shape:
        return SHARED if first.whole.agrees(changed.whole, 1) else UNKNOWN
    dim = grown_dim(first.shape, longer.shape, m + 1)
    if dim is None or dim not in first.rows or not first.rows[dim].agrees(changed.rows[dim], m):
        return UNKNOWN
    return dim
