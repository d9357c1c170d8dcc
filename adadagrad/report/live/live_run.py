"""A run as it is being written: what the page shows of it, and what of that is new."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from adadagrad.report.live.buckets import Buckets, number
from adadagrad.report.live.tail import Tail
from adadagrad.report.reader import LOG_NAME

METRIC_POINTS = 2000
"""Points of a metric from which on every other one is left out."""
QUIET_SECONDS = 30.0
"""Without a new line for so long a run is called stalled; or for ten of its steps, where that is more."""
SHOWN = ("loss", "lr", "noise_scale", "relative_variance", "threshold", "requested", "rate_factor", "progress")
"""Numbers of the latest step, beside its counts."""


class LiveRun:
    """One run directory.

    Args:
        directory: Where its log is, or will be.
        most: About how many bytes of it are read at one look.
    """

    def __init__(self, directory: Path, *, most: int | None = None) -> None:
        log = directory / LOG_NAME
        self.directory = directory
        self._tail = Tail(log) if most is None else Tail(log, most=most)
        self._generation = 0
        self._buckets = Buckets()
        self._begin()

    def _begin(self) -> None:
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        self._generation += self._buckets.joined + 1
        self._buckets = Buckets()
        self._metrics: dict[str, list[tuple[int, float | None]]] = {}
        self._logged = self._skipped = self._broken = 0

    def update(self) -> bool:
        """Read what has been written.

        Returns:
            Whether there is still more to read.
        """
        lines, again = self._tail.read()
        if again:
            self._begin()
        for line in lines:
            if line.strip():
                try:
                    self._take(json.loads(line))
                except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
                    self._broken += 1
        return self._tail.more

    @property
    def place(self) -> tuple[int, int, int]:
        """How far what is known reaches: which generation of rows, whole rows, logged lines."""
        return self._generation + self._buckets.joined, self._buckets.closed, self._logged

    def news(self, place: tuple[int, int, int] | None) -> dict[str, Any]:
        """Return what somebody does not know yet, in plain values of which none is NaN or infinite.

        Args:
            place: What `place` was at his last look; None for all.

        Returns:
            Rows from the index ``from`` on (0: forget what was there), the metrics where there are new ones, and all
            that is short.
        """
        known = place is not None and place[0] == self.place[0] and place[1] <= self._buckets.closed
        first = place[1] if known and place is not None else 0
        news: dict[str, Any] = {
            "name": self.directory.resolve().name,
            "state": self.state(),
            "start": plain(self.start),
            "last": plain(self._last),
            "skipped": self._skipped,
            "broken": self._broken,
            "from": first,
            "rows": [bucket.row() for bucket in self._buckets.all[first:]],
        }
        if not known or place is None or place[2] != self._logged:
            news["metrics"] = self._metrics
        return news

    def state(self) -> str:
        """Say how the run is: waiting, running, stalled or finished."""
        if not self.start and not self._buckets.all:
            return "waiting"
        if self.end is not None:
            return "finished"
        try:
            quiet = time.time() - self._tail.path.stat().st_mtime
        except OSError:
            return "waiting"
        steps = number(self._last.get("step")) or 1.0
        typical = 10 * (number(self._last.get("seconds")) or 0.0) / max(1.0, steps)
        return "stalled" if quiet > max(QUIET_SECONDS, typical) else "running"

    def _take(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "start":
            self.start, self.end = record, None
        elif kind == "step":
            self._buckets.add(record)
            measured = {key: record[key] for key in SHOWN if record.get(key) is not None}
            counts = {key: record[key] for key in ("step", "samples_seen", "seconds", "global_batch_size", "reason")
                      if key in record}  # fmt: skip
            self._last |= counts | measured
            self.end = None
        elif kind == "skip":
            self._last |= {"loss": record.get("loss"), "step": record["step"]}
            self._skipped += 1
        elif kind == "log":
            for name, value in record["metrics"].items():
                if number(value) is not None:
                    self._log(name, int(record["samples_seen"]), float(value))
            self._logged += 1
        elif kind == "end":
            self.end = record

    def _log(self, name: str, seen: int, value: float) -> None:
        points = self._metrics.setdefault(name, [])
        points.append((seen, value if math.isfinite(value) else None))
        if len(points) > METRIC_POINTS:
            del points[1:-1:2]


def plain(value: Any) -> Any:
    """Return a value in which numbers that JSON lacks are words, as in the log.

    Args:
        value: Of a line.
    """
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
