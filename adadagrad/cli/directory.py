"""Run directories: which one a run gets, and that no run writes over another."""

from __future__ import annotations

import re
from pathlib import Path

from adadagrad.core.errors import InvalidArgument

RUNS = Path("runs")
CHECKPOINT_NAME = "checkpoint.pt"
REPORT_NAME = "report.html"


def new_directory(out: Path | None, command: str) -> Path:
    """Make the directory that a command writes to.

    Args:
        out: What the user asked for; None takes the next number under ``runs/``.
        command: The command's name, for the numbered directory.

    Returns:
        A directory that exists and is empty.

    Raises:
        InvalidArgument: `out` is not empty, is a file, or cannot be made.
    """
    try:
        if out is None:
            return _next_numbered(command)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InvalidArgument(
                f"--out {out} is not an empty folder: choose another one, or continue a run of train with --resume"
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(f"--out {out or RUNS} cannot be made: {error.strerror or error}") from error
    return out


def remove_if_empty(directory: Path) -> None:
    """Take back a directory in which nothing came to be, so that a refused argument leaves no trace."""
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _next_numbered(command: str) -> Path:
    """``runs/train-007`` after ``runs/train-006``; where two processes race, each gets its own."""
    RUNS.mkdir(exist_ok=True)
    pattern = re.compile(rf"{re.escape(command)}-(\d+)")
    taken = [int(match[1]) for path in RUNS.iterdir() if (match := pattern.fullmatch(path.name))]
    number = max(taken, default=0) + 1
    while True:
        path = RUNS / f"{command}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
