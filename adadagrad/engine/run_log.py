"""run.jsonl: one record a line, flushed line by line, so that a killed run stays readable.

What the records hold is in `log_records.py`.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from adadagrad.core.errors import InvalidArgument

_ENCODER = json.JSONEncoder(allow_nan=False)


class RunLog:
    """Appends records to ``run.jsonl`` of a run directory; without a directory it does nothing.

    NaN and infinities are written as the strings ``"nan"``, ``"inf"``, ``"-inf"``, which JSON lacks.

    Args:
        directory: The run directory, created if it does not exist; None for no log.

    Raises:
        InvalidArgument: `log_dir` cannot be created or written in. Found out here, not when a step has been trained.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.path: Path | None = None
        self._file: IO[bytes] | None = None
        if directory is None:
            return
        try:
            self.path = Path(directory) / "run.jsonl"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.path.open("a").close()
            tempfile.TemporaryFile(dir=self.path.parent).close()  # permissions do not tell all: try it
        except (OSError, TypeError) as error:
            raise InvalidArgument(
                f"log_dir must be a directory that can be written in, got {str(directory)!r} ({error}): choose another "
                "one, or None for no log"
            ) from error

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Append one line.

        Args:
            kind: What the line is: ``"start"``, ``"step"``, ``"skip"``, ``"log"`` or ``"end"``.
            record: Plain values.
        """
        if self.path is None:
            return
        if self._file is None:
            self._file = self.path.open("ab")
        line = {"kind": kind, **record}
        try:
            text = _ENCODER.encode(line)
        except ValueError:
            text = _ENCODER.encode(_without_nan(line))
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def refuse_other(self, state: Mapping[str, Any] | None = None) -> None:
        """Refuse to write behind, or over, the records of another run.

        Args:
            state: What `state_dict` returned in the run to continue; None for a new run.

        Raises:
            InvalidArgument: `log_dir` holds a log that does not begin as the state's does.
        """
        if self.position > 0 and (state is None or state["first_line"] != self._first_line()):
            raise InvalidArgument(
                f"log_dir holds the log of another run, {self.path}: choose an empty directory, or continue that run "
                "with engine.load(...) from a checkpoint of its own"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return how long the log is [bytes], and what tells it from others: a checksum of its first line."""
        return {"position": self.position, "first_line": self._first_line()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Drop what was written after a checkpoint, so that the resumed run's records follow on it.

        Args:
            state: What `state_dict` returned when the checkpoint was made.

        Raises:
            InvalidArgument: `log_dir` holds the log of another run, of which nothing is dropped.
        """
        self.refuse_other(state)
        self.close()
        if self.path is not None and self.position > state["position"]:
            os.truncate(self.path, state["position"])

    def restart(self) -> None:
        """Drop everything, for a run that begins anew because nothing of it was saved."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _first_line(self) -> int | None:
        """Return the checksum of the start record, which holds the time; None for an empty log."""
        if self.path is None or self.position == 0:
            return None
        with self.path.open("rb") as file:
            return zlib.crc32(file.readline())

    def close(self) -> None:
        """Close the file; a later record opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _without_nan(value: Any) -> Any:
    """Return the value with every float that JSON lacks as a word."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
