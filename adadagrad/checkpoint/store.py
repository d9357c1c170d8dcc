"""`CheckpointStore`: a folder with the last few checkpoints of a run, from which the newest good one is found."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, final

from adadagrad.checkpoint.file import load_checkpoint, save_checkpoint
from adadagrad.checkpoint.sharded import load_sharded, on_all, on_first, save_sharded
from adadagrad.checkpoint.tree import Like, has_shards
from adadagrad.core.checks import check_integer
from adadagrad.core.comm import ALONE, Ranks
from adadagrad.core.errors import CorruptCheckpoint


@final
class CheckpointStore:
    """Checkpoints named by their step, ``step-000000012.pt``, of which the newest few are kept.

    That of a sharded model is a folder without the ending, to which every rank writes.

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
        ending = "" if has_shards(content) else ".pt"
        write(self.folder / f"step-{step:09d}{ending}", content, self._ranks)
        if self._ranks.index == 0:
            for old in self.paths()[self.keep :]:
                _remove(old)
            for left in self.folder.glob("*.tmp"):  # of a save that was killed
                _remove(left)

    def paths(self) -> list[Path]:
        """Return the checkpoints that are there, good or bad, the newest first."""
        found = [path for path in self.folder.glob("step-*") if path.suffix == ".pt" or path.suffix == ""]
        return sorted(found, reverse=True)

    def load_newest(self, like: Like = lambda path: None) -> dict[str, Any] | None:
        """Return the newest good checkpoint, with a warning for every newer one that is not.

        Args:
            like: How tensors that were sharded shall lie on these ranks.

        Returns:
            Its content; None where there is no checkpoint at all.

        Raises:
            CorruptCheckpoint: There are checkpoints, and all are bad.
        """
        paths = [Path(name) for name in self._ranks.gather([str(path) for path in self.paths()])[0]]
        for path in paths:
            try:
                return read(path, like, self._ranks)
            except CorruptCheckpoint as error:
                last = error
                warnings.warn(f"{error}; going back to the one before it", stacklevel=3)
        if paths:
            raise CorruptCheckpoint(
                f"none of the {len(paths)} checkpoints in {self.folder} can be read: start again with an empty log_dir"
            ) from last
        return None


def write(path: Path, content: dict[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint: a file by the first rank, or a folder by all where the content is sharded.

    Args:
        path: The file or folder.
        content: As for `save_checkpoint`, and DTensors; of what is not sharded the first rank's counts.
        ranks: The ranks.

    Raises:
        OSError: It could not be written.
    """
    if has_shards(content):
        save_sharded(path, content, ranks)
    else:
        on_first(lambda: save_checkpoint(path, content), path, ranks)


def read(path: Path, like: Like, ranks: Ranks) -> dict[str, Any]:
    """Read a checkpoint on every rank, or on none.

    Args:
        path: The file or folder.
        like: How tensors that were sharded shall lie on these ranks.
        ranks: The ranks.

    Returns:
        Its content.

    Raises:
        CorruptCheckpoint: It cannot be read, here or on another rank.
    """
    if max(ranks.sum(float(path.is_dir()))) > 0:
        return load_sharded(path, like, ranks)
    return on_all(lambda: load_checkpoint(path), path, ranks)


def _remove(path: Path) -> None:
    """Delete a file, or a folder so that no half of it is left under its name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path if path.suffix == ".tmp" else path.replace(path.with_name(path.name + ".old.tmp"))
    shutil.rmtree(gone, ignore_errors=True)
