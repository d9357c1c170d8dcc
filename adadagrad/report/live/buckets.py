"""Steps of a run in at most some hundred buckets, however long it is: when there are too many, pairs become one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adadagrad.report.run import CUT

MOST = 1200
"""Buckets from which on pairs are joined."""
COLUMNS = ("seen", "seconds", "size", "loss", "loss_low", "loss_high", "lr", "left", "right", "requested")
"""What a bucket's row holds, in order."""


@dataclass(slots=True)
class Mean:
    """A mean of numbers that come one by one; those that are not finite are passed over."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float | None) -> None:
        """Take a number in."""
        if value is not None and math.isfinite(value):
            self.total += value
            self.count += 1

    def join(self, other: Mean) -> None:
        """Take in what another one has."""
        self.total += other.total
        self.count += other.count

    @property
    def value(self) -> float | None:
        """The mean, None of nothing."""
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class Bucket:
    """Some steps in a row."""

    seen: int
    seconds: float
    size: int
    lr: float | None
    right: float | None
    loss: Mean
    low: float
    high: float
    left: Mean  # of logarithms, as it is drawn on a logarithmic axis
    requested: Mean  # of logarithms

    @classmethod
    def of(cls, record: Mapping[str, Any], size_before: int | None) -> Bucket:
        """Make one of a single step.

        Args:
            record: Its line.
            size_before: Batch size of the step before, which stays in the trace where the budget cuts this one short.

        Returns:
            The bucket.

        Raises:
            OverflowError: A count is no number of this world.
        """
        seen, size = int(record["samples_seen"]), int(record["global_batch_size"])
        float(seen), float(size)
        cut = record.get("reason") == CUT and size_before is not None and size < size_before
        loss, left, requested = Mean(), Mean(), Mean()
        value = number(record.get("loss"))
        loss.add(value)
        left.add(_logarithm(number(record.get("relative_variance"))))
        requested.add(_logarithm(number(record.get("requested"))))
        finite = value is not None and math.isfinite(value)
        return cls(
            seen=seen,
            seconds=float(record["seconds"]),
            size=size_before if cut and size_before is not None else size,
            lr=None if cut else number(record.get("lr")),  # a rule's rate for the size that it was cut to
            right=number(record.get("threshold")),
            loss=loss,
            low=value if finite and value is not None else math.inf,
            high=value if finite and value is not None else -math.inf,
            left=left,
            requested=requested,
        )

    def join(self, later: Bucket) -> None:
        """Take in the steps that follow.

        Args:
            later: Their bucket.
        """
        self.seen, self.seconds, self.size = later.seen, later.seconds, later.size
        self.lr = self.lr if later.lr is None else later.lr
        self.right = self.right if later.right is None else later.right
        self.low, self.high = min(self.low, later.low), max(self.high, later.high)
        for mine, other in ((self.loss, later.loss), (self.left, later.left), (self.requested, later.requested)):
            mine.join(other)

    def row(self) -> list[float | None]:
        """Return the numbers of `COLUMNS`, None for those that are not known or not finite."""
        spread = (self.low, self.high) if self.loss.count else (None, None)
        left, requested = (None if v is None else math.exp(v) for v in (self.left.value, self.requested.value))
        values = (
            self.seen, self.seconds, self.size, self.loss.value, *spread, self.lr, left, self.right, requested,
        )  # fmt: skip
        return [_short(value) for value in values]


class Buckets:
    """The buckets of a run.

    Args:
        most: Buckets from which on pairs are joined.
    """

    def __init__(self, *, most: int = MOST) -> None:
        self._most, self._steps, self._in_last = most, 1, 0
        self.all: list[Bucket] = []
        self.joined = 0
        """How often pairs have been joined, after which every row is another one."""

    @property
    def closed(self) -> int:
        """How many buckets change no more, until pairs are joined."""
        return len(self.all) - (0 < self._in_last < self._steps)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in a step.

        Args:
            record: Its line.
        """
        one = Bucket.of(record, self.all[-1].size if self.all else None)
        if 0 < self._in_last < self._steps:
            self.all[-1].join(one)
            self._in_last += 1
            return
        self.all.append(one)
        self._in_last = 1
        if len(self.all) >= self._most:
            for first, second in zip(self.all[::2], self.all[1::2], strict=False):
                first.join(second)
            paired = len(self.all) % 2 == 0
            self.all = self.all[::2]
            self._in_last = self._steps + 1 if paired else 1
            self._steps *= 2
            self.joined += 1


def number(value: object) -> float | None:
    """Return a number of the log, also one that is not finite; None where there is none.

    Args:
        value: Of a line.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def _logarithm(value: float | None) -> float | None:
    return math.log(value) if value is not None and 0 < value < math.inf else None


def _short(value: float | None) -> float | None:
    """Six digits, which is more than a screen shows, in half the bytes."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")
