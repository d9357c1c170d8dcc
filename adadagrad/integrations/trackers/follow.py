"""A run.jsonl into a tracker, while it is written or afterwards: every line once, also over stops and resumes.

Lines are told apart by their place in the run: the step, and for logged metrics which one after that step. What has
been sent is sent no more. So where a resume has cut the log back, the steps that are trained a second time are passed
over until the run is ahead of what the tracker has: its curves have no second branch.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adadagrad.core.checks import check_positive
from adadagrad.core.errors import CorruptLog, InvalidArgument
from adadagrad.integrations.trackers.base import Tracker
from adadagrad.integrations.trackers.metrics import is_number, numbers_of

LOG_NAME = "run.jsonl"
LAST = 64
"""Bytes before the place read up to that must be as they were: a log that was cut back and has grown again differs."""


class Follower:
    """Sends the lines of a run to a tracker, as far as they are written.

    Args:
        run_dir: The run directory; it may be empty as yet.
        tracker: Where to; it stays open.
        mark: A file that keeps how far the lines have been sent, for the next `Follower` of the same run and the same
            tracker; None sends all from the beginning.

    Raises:
        InvalidArgument: `mark` is no file that a follower has written, or its folder does not exist.
    """

    def __init__(self, run_dir: str | os.PathLike[str], tracker: Tracker, *, mark: str | Path | None = None) -> None:
        self._log, self._tracker, self._mark = Path(run_dir) / LOG_NAME, tracker, None if mark is None else Path(mark)
        self._offset, self._before, self._lines = 0, b"", 0
        self._place = (0, -1)  # of the last line: the step, and which of those logged after it, from 1
        self._sent: tuple[int, int] = (0, -1)
        self._start: int | None = None
        self.finished = False
        """Whether the run has used its budget, by the last line read."""
        if self._mark is not None and self._mark.exists():
            self._read_mark(self._mark)
        elif self._mark is not None and not self._mark.parent.is_dir():
            raise InvalidArgument(f"mark must be in a folder that exists, got {str(self._mark)!r}")

    def catch_up(self) -> int:
        """Send what has been written since the last call.

        Returns:
            How many lines were sent.

        Raises:
            CorruptLog: A line is not a record.
            InvalidArgument: The log is of another run than the mark.
        """
        sent = 0
        try:
            for record in self._new_records():
                found = self._read(record)
                if found is not None:
                    metrics, step, seen = found
                    self._tracker.log(metrics, samples_seen=seen, step=step)
                    self._sent = self._place
                    sent += 1
        except BaseException:
            self._rewind()
            raise
        finally:
            if sent and self._mark is not None:
                self._write_mark(self._mark)
        return sent

    def _read(self, line: bytes) -> tuple[dict[str, float], int, int] | None:
        """Return a line's numbers, step and samples; None where there is nothing to send or it has been sent before."""
        try:
            record = json.loads(line)
            kind = record["kind"]
            at = (int(record["step"]), int(record["samples_seen"])) if kind in ("step", "skip", "log") else None
            logged = dict(record["metrics"]) if kind == "log" else None
            numbers = {n: float(v) for n, v in logged.items() if is_number(v)} if logged is not None else {}
            numbers |= numbers_of(record) if kind in ("step", "skip") else {}
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CorruptLog(f"{self._log}, line {self._lines}: not a record ({error!r})") from error
        self.finished = kind == "end"
        if kind == "start":
            self._check_start({name: value for name, value in record.items() if name != "time"})
        if at is None:
            return None
        step, seen = at
        self._place = (step, 0 if logged is None else self._place[1] + 1 if self._place[0] == step else 1)
        if self._place <= self._sent:
            return None
        return numbers, step, seen

    def _rewind(self) -> None:
        """Read the log from its beginning the next time; what has been sent is known."""
        self._offset, self._before, self._place, self._lines = 0, b"", (0, -1), 0

    def _new_records(self) -> Iterator[bytes]:
        """Yield the whole lines after those read before; all of them where the log has been cut back meanwhile."""
        if not self._log.is_file():
            return
        with self._log.open("rb") as file:
            file.seek(max(0, self._offset - LAST))
            if file.read(min(LAST, self._offset)) != self._before:
                self._rewind()
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # half written
                self._offset += len(line)
                self._before = (self._before + line)[-LAST:]
                self._lines += 1
                if line.strip():
                    yield line

    def _check_start(self, start: Mapping[str, Any]) -> None:
        checksum = zlib.crc32(json.dumps(start, sort_keys=True).encode())
        if self._start is not None and self._start != checksum:
            raise InvalidArgument(
                f"{self._log} is not the run that was followed before: follow another run with a mark and a tracker of "
                "its own"
            )
        self._start = checksum

    def _read_mark(self, mark: Path) -> None:
        try:
            kept = json.loads(mark.read_text(encoding="utf-8"))
            self._start, self._sent = int(kept["start"]), (int(kept["step"]), int(kept["logged"]))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"mark must be a file that a follower has written, got {str(mark)!r}") from error

    def _write_mark(self, mark: Path) -> None:
        kept = {"start": self._start, "step": self._sent[0], "logged": self._sent[1]}
        beside = mark.with_name(f".{mark.name}.new")
        beside.write_text(json.dumps(kept) + "\n", encoding="utf-8")
        beside.replace(mark)


def follow(
    run_dir: str | os.PathLike[str],
    tracker: Tracker,
    *,
    mark: str | Path | None = None,
    wait: bool = False,
    poll_seconds: float = 1.0,
) -> int:
    """Send a run to a tracker: what is in its log, or all that comes until the run has used its budget.

    Args:
        run_dir: The run directory.
        tracker: Where to; it stays open, and is to be closed before what it has taken is looked at.
        mark: A file that keeps how far the lines have been sent, so that the next call goes on from there; None sends
            all from the beginning. Kept when the call ends, also by an error or Ctrl-C; lines sent before the process
            is killed outright are sent again.
        wait: Go on until the run ends, also where it has not begun.
        poll_seconds: How long to wait between two looks at the log.

    Returns:
        How many lines were sent.

    Raises:
        CorruptLog: A line is not a record.
        InvalidArgument: `mark` is that of another run, or the wait is not above 0.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> class Printer:
        ...     def log(self, metrics, *, samples_seen, step):
        ...         print(samples_seen, metrics)
        ...     def close(self):
        ...         pass
        >>> with tempfile.TemporaryDirectory() as run:
        ...     line = '{"kind": "step", "step": 1, "samples_seen": 64, "loss": 2.5, "lr": 0.1}'
        ...     _ = Path(run, "run.jsonl").write_text(line + chr(10))
        ...     follow(run, Printer())
        64 {'adadagrad/loss': 2.5, 'adadagrad/lr': 0.1}
        1
    """
    check_positive(poll_seconds=poll_seconds)
    follower = Follower(run_dir, tracker, mark=mark)
    sent = follower.catch_up()
    while wait and not follower.finished:
        time.sleep(poll_seconds)
        sent += follower.catch_up()
    return sent
