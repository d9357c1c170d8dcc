"""Batch sizes that another run has chosen, taken from its log: replay, whatever may have measured them."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import CorruptLog, InvalidArgument
from adadagrad.core.records import Observation
from adadagrad.policies.base import AbstractPolicy

LOG_NAME = "run.jsonl"


@dataclass(frozen=True, slots=True)
class RecordedBatch(AbstractPolicy):
    """Ask for the batch sizes that another run has decided on, at the same numbers of examples seen.

    Use it to repeat a run exactly on other hardware: on another number of processes, where a test that measures a
    subset would see another one; with another micro-batch size; or without paying for measurements again. Use it also
    to separate two effects: the same sizes under another optimizer or learning rate.

    It is exact as long as the run's bounds let it be: `max_batch_size` no smaller than in the record, no
    `multiple_of` or `max_growth` that the record does not keep to, and no more processes than the smallest batch has
    examples. Past the end of the record its last decision holds. Costs nothing.

    Args:
        plan: Pairs (examples seen, batch size), the first at 0, in increasing order; each size holds from there on up
            to the next pair. `from_log` reads them from a run's log.

    Raises:
        InvalidArgument: The plan is empty, does not begin at 0 or does not increase, or a number is not an integer in
            its range.

    Source: none needed.

    Example:
        >>> policy = RecordedBatch(((0, 16), (16, 24), (40, 24), (64, 60)))
        >>> [policy.required_batch_size(Observation(samples_seen=t)) for t in (0, 16, 40, 64, 1000)]
        [16.0, 24.0, 24.0, 60.0, 60.0]
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[bool] = False

    plan: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", _checked(self.plan))

    @classmethod
    def from_log(cls, path: str | os.PathLike[str]) -> RecordedBatch:
        """Read the decisions of a run.

        Args:
            path: Its ``run.jsonl``, or the directory that holds one. A last line that was cut off when the run was
                killed is passed over.

        Returns:
            The policy that repeats them; its plan holds one pair for each change of the size.

        Raises:
            InvalidArgument: There is no such file, or its run continued another one, whose log is elsewhere.
            CorruptLog: A line is not a record, or the file is no log of a run; the message names file and line.
        """
        log = Path(path)
        if log.is_dir():
            log /= LOG_NAME
        if not log.is_file():
            raise InvalidArgument(f"plan must be the {LOG_NAME} of a run or its directory, and {log} does not exist")
        decided: list[tuple[int, int]] = []
        for number, record in _records(log):
            try:
                _take_in(decided, record)
            except (KeyError, TypeError, ValueError) as error:
                raise CorruptLog(f"{log}, line {number}: no decision can be read from it ({error!r})") from error
        if not decided:
            raise CorruptLog(f"{log}, line 1: no start record; the run was stopped before it wrote anything")
        if decided[0][0] != 0:
            raise InvalidArgument(
                f"plan must be the log of a whole run, and {log} begins at {decided[0][0]} samples seen: give the log "
                "of the run that it continues, or resume that run in its own directory"
            )
        changes = (pair for before, pair in pairwise([(0, 0), *decided]) if pair[1] != before[1])
        return cls(tuple(changes))

    def required_batch_size(self, observation: Observation) -> float:
        """Return the size that was decided on at `samples_seen`, in examples."""
        index = bisect_right(self.plan, observation.samples_seen, key=itemgetter(0))
        return float(self.plan[index - 1][1])


def _checked(plan: Any) -> tuple[tuple[int, int], ...]:
    """Return the plan as pairs, or say which rule it breaks."""
    pairs = plan if isinstance(plan, tuple | list) else [None]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise InvalidArgument(
            f"plan must be pairs (samples_seen, global_batch_size), got {plan!r:.80}: to read a log, write "
            "RecordedBatch.from_log(path)"
        )
    last = -1
    for seen, size in plan:
        check_integer(0, **{"samples_seen in plan": seen})
        check_integer(1, **{"a batch size in plan": size})
        if seen <= last:
            raise InvalidArgument(f"samples_seen in plan must increase, got {seen} after {last}")
        last = seen
    if not plan or plan[0][0] != 0:
        raise InvalidArgument(f"plan must begin at 0 samples seen, got {plan[0][0] if plan else 'no pair at all'}")
    return tuple((seen, size) for seen, size in plan)


def _take_in(decided: list[tuple[int, int]], record: Mapping[str, Any]) -> None:
    """Add the decision of a record, in place of what was decided at its number of samples or after it."""
    sizes = {"start": "global_batch_size", "step": "next_global_batch_size", "skip": "next_global_batch_size"}
    if record["kind"] not in sizes:
        return
    if not decided and record["kind"] != "start":
        raise ValueError("a run begins with a start record")
    seen = int(record["samples_seen"])
    while decided and decided[-1][0] >= seen:
        decided.pop()
    decided.append((seen, int(record[sizes[record["kind"]]])))


def _records(log: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and record of every line; only a last line without its newline may be broken."""
    lines = log.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
                raise ValueError("not an object with a kind")
        except ValueError as error:
            if number == len(lines):
                return
            raise CorruptLog(f"{log}, line {number}: not a record ({error})") from error
        yield number, record
