"""A batch size given stage by stage, also as the one-line string of Megatron-LM."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import ClassVar

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Observation
from adadagrad.policies.base import AbstractPolicy

_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([KMBT]?)", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, slots=True, init=False)
class StagedBatch(AbstractPolicy):
    """Ask for a size that changes when given numbers of examples have been seen.

    The size is that of the last stage whose threshold is <= `samples_seen`.

    Use it to repeat a schedule that somebody else has published, or as a baseline. Sizes may also fall. It knows
    nothing of the model. Costs nothing.

    Args:
        stages: A mapping or an iterable of pairs, threshold [examples seen] to size [examples]; or a string of
            entries ``"threshold:size"`` separated by blanks or commas, where both parts may be decimal and may end
            in K, M, B or T (1e3, 1e6, 1e9, 1e12, in either case). The order does not matter. One threshold must
            be 0, no two may be equal, and sizes must be >= 1.

    Raises:
        InvalidArgument: The string cannot be read, or the stages break one of the rules above.

    Source: Megatron-LM, ``--step-batch-size-schedule`` (syntax verified in NVIDIA/Megatron-LM at d98e8a6).
    Differs: thresholds are always examples. Where Megatron-LM has a sequence length configured they are tokens:
        divide them by that length. A number that is not whole ("1.2345K") is an error instead of being cut.

    Example:
        >>> policy = StagedBatch("0:256 1M:1024")
        >>> policy
        StagedBatch(stages=((0, 256), (1000000, 1024)))
        >>> policy == StagedBatch({0: 256, 1_000_000: 1024})
        True
        >>> [policy.required_batch_size(Observation(samples_seen=t)) for t in (0, 999_999, 1_000_000)]
        [256.0, 256.0, 1024.0]
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[bool] = False

    stages: tuple[tuple[int, int], ...]
    """Pairs (examples seen, size), sorted, the first at 0."""

    def __init__(self, stages: str | Mapping[int, int] | Iterable[tuple[int, int]]) -> None:
        if isinstance(stages, str):
            pairs = _parse(stages)
        elif isinstance(stages, Mapping):
            pairs = list(stages.items())
        else:
            pairs = [_pair(entry) for entry in stages]
        object.__setattr__(self, "stages", _checked(pairs))

    def required_batch_size(self, observation: Observation) -> float:
        """Return the size of the stage that `samples_seen` lies in, in examples."""
        index = bisect_right(self.stages, observation.samples_seen, key=lambda stage: stage[0])
        return float(self.stages[max(index - 1, 0)][1])


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
