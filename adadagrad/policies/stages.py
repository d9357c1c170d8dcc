"""Stages of a batch size as a user writes them, read into sorted pairs; the string is that of Megatron-LM."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from itertools import pairwise

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument

Stages = tuple[tuple[int, int], ...]
"""Pairs (examples seen, batch size), sorted, the first at 0."""

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([KMBT]?)", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def read_stages(stages: str | Mapping[int, int] | Iterable[tuple[int, int]]) -> Stages:
    """Return stages in the form that they are kept in, or say which rule they break.

    Args:
        stages: As `StagedBatch` describes it.

    Returns:
        Sorted pairs.

    Raises:
        InvalidArgument: The string cannot be read, a number is not an integer in its range, no threshold is 0 or two
            are equal.

    Example:
        >>> read_stages("1M:1024, 0:256")
        ((0, 256), (1000000, 1024))
    """
    if isinstance(stages, str):
        return _checked(_parse(stages))
    if isinstance(stages, Mapping):
        return _checked(list(stages.items()))
    return _checked([_pair(entry) for entry in stages])


def _parse(text: str) -> list[tuple[int, int]]:
    """Read ``"0:256 1M:1024"`` as pairs."""
    pairs = []
    for entry in re.split(r"[\s,]+", text.strip(" \t\r\n,")):
        threshold, colon, size = entry.partition(":")
        if not colon:
            raise InvalidArgument(f'stages must be like "0:256 1M:1024", got the entry {entry!r} in {text!r}')
        pairs.append((_number(threshold, entry), _number(size, entry)))
    return pairs


def _number(text: str, entry: str) -> int:
    """Read ``"2.4B"`` as 2_400_000_000, exactly."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise InvalidArgument(
            f"stages must hold numbers such as 256, 2.4B or 100k, got {text!r} in the entry {entry!r}"
        )
    value = Decimal(match[1]) * _FACTORS[match[2].upper()]
    if value != int(value):
        raise InvalidArgument(f"stages must hold whole numbers, got {text!r} = {value:f} in the entry {entry!r}")
    return int(value)


def _pair(entry: object) -> tuple[int, int]:
    """Return an entry of an iterable as a pair; what its parts are is checked later."""
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return entry[0], entry[1]
    raise InvalidArgument(f"stages must be pairs (samples_seen, global_batch_size), got {entry!r}")


def _checked(pairs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the stages sorted, or say which rule they break."""
    for threshold, size in pairs:
        check_integer(0, **{"a threshold in stages": threshold})
        check_integer(1, **{"a batch size in stages": size})
    stages = sorted(pairs)
    if not stages or stages[0][0] != 0:
        first = stages[0][0] if stages else "no stage at all"
        raise InvalidArgument(f"stages must begin at threshold 0, got {first}: add an entry such as 0:256")
    for (threshold, _), (following, _) in pairwise(stages):
        if threshold == following:
            raise InvalidArgument(f"stages must have different thresholds, got {threshold} twice")
    return tuple(stages)
