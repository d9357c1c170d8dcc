"""`CheckpointStore`: a folder with the last few checkpoints of a run, from which the newest good one is found."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, final

from adadagrad.checkpoint.file import load_checkpoint, save_checkpoint
from adadagrad.core.checks import check_integer
from adadagrad.core.comm import ALONE, Ranks
from adadagrad.core.errors import CorruptCheckpoint

Content = TypeVar("Content")


@final
class CheckpointStore:
    """Checkpoints named by their step, ``step-000000012.pt``, of which the newest few are kept.

    An older one is deleted only when a newer one is whole and on the disk. With several ranks everything here is
    collective: the first rank writes, every rank reads (from a file system that all of them see), and a file that is
    bad on one rank is bad for all.

    Args:
        folder: The folder, made with the first checkpoint.
        keep: How many are kept, >= 1. More survive more damage, and take more room.
        ranks: The processes that share the run.

    Raises:
        InvalidArgument: `keep` is no integer >= 1.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3, ranks: Ranks = ALONE) -> None:
        check_integer(1, keep_checkpoints=keep)
        self.folder, self.keep, self._ranks = Path(folder), keep, ranks

    def save(self, step: int, content: dict[str, Any]) -> None:
        """Write a checkpoint and delete what is now too old; no rank goes on before it is on the disk.

        Args:
            step: Number of the step after which it is made; one of the same step is replaced.
            content: As for `save_checkpoint`.
        """
        write(self.folder / f"step-{step:09d}.pt", content, self._ranks)
        if self._ranks.index == 0:
            for old in self.paths()[self.keep :]:
                old.unlink(missing_ok=True)
            for left in self.folder.glob("*.tmp"):  # of a save that was killed
                left.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """Return the checkpoints that are there, good or bad, the newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True) if self.folder.is_dir() else []

    def load_newest(self) -> dict[str, Any] | None:
        """Return the newest good checkpoint, with a warning for every newer one that is not.

        Returns:
            Its content; None where there is no checkpoint at all.

        Raises:
            CorruptCheckpoint: There are checkpoints, and all are bad.
        """
        paths = [Path(name) for name in self._ranks.gather([str(path) for path in self.paths()])[0]]
        for path in paths:
            try:
                return read(path, load_checkpoint, self._ranks)
            except CorruptCheckpoint as error:
                last = error
                warnings.warn(f"{error}; going back to the one before it", stacklevel=3)
        if paths:
            raise CorruptCheckpoint(
                f"none of the {len(paths)} checkpoints in {self.folder} can be read: start again with an empty log_dir"
            ) from last
        return None


def write(path: Path, content: dict[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint on the first rank; the others wait, and learn if it failed.

    Args:
        path: The file.
        content: As for `save_checkpoint`; read on the first rank only.
        ranks: The ranks.

    Raises:
        OSError: The file could not be written.
    """
    error: Exception | None = None
    if ranks.index == 0:
        try:
            save_checkpoint(path, content)
        except Exception as problem:
            error = problem
    (failed,) = ranks.sum(float(error is not None))
    if error is not None:
        raise error
    if failed:
        raise OSError(f"{path} could not be written on the first rank")


def read(path: Path, load: Callable[[Path], Content], ranks: Ranks) -> Content:
    """Read a checkpoint on every rank, or on none.

    Args:
        path: The file.
        load: Reads it.
        ranks: The ranks.

    Returns:
        What `load` returns here.

    Raises:
        CorruptCheckpoint: It cannot be read, here or on another rank.
    """
    content, error = None, None
    try:
        content = load(path)
    except CorruptCheckpoint as problem:
        error = problem
    (failed,) = ranks.sum(float(error is not None))
    if error is not None:
        raise error
    if failed or content is None:
        raise CorruptCheckpoint(f"{path} cannot be read on {failed:.0f} other ranks: give all the same file system")
    return content
