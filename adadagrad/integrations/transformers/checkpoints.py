"""The engine's part of a Trainer checkpoint, and which checkpoint of a folder is whole."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from transformers.trainer_callback import TrainerState

from adadagrad.checkpoint.file import load_checkpoint
from adadagrad.checkpoint.store import read, write
from adadagrad.core.errors import CorruptCheckpoint, InvalidArgument
from adadagrad.engine.adaptive_batch import AdaptiveBatch

NAME = "adadagrad.pt"
"""The engine's file in a checkpoint folder."""

STATE = "trainer_state.json"
"""Trainer's last file in it."""


def save_progress(engine: AdaptiveBatch, folder: Path) -> None:
    """Write where the engine stands into a checkpoint folder; on all ranks, before Trainer's own files.

    Args:
        engine: The engine, between two steps.
        folder: The folder, made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / NAME, {"progress": engine.progress_state()}, engine.parallel.ranks)


def load_progress(engine: AdaptiveBatch, folder: Path) -> None:
    """Continue where the engine of a checkpoint stood.

    Args:
        engine: A new engine, whose model and optimizer Trainer has loaded.
        folder: The checkpoint.
    """
    content = read(folder / NAME, lambda path: None, engine.parallel.ranks)
    engine.load_progress_state(content["progress"])


def refuse_incomplete(folder: Path) -> None:
    """Refuse a checkpoint from which no run can go on exactly.

    Args:
        folder: The checkpoint.

    Raises:
        InvalidArgument: It does not exist, or was saved by another trainer or with ``save_only_model=True``.
        CorruptCheckpoint: The process ended while it was being saved, or the engine's file is damaged.
    """
    if not folder.is_dir():
        raise InvalidArgument(
            f"resume_from_checkpoint={str(folder)!r} does not exist: give a checkpoint's folder, or True"
        )
    if not (folder / NAME).exists():
        raise InvalidArgument(
            f"{folder} holds no {NAME}: it was saved by another trainer or with save_only_model=True, and a run cannot "
            "go on exactly from it; load its model, and start anew"
        )
    load_checkpoint(folder / NAME)
    try:
        TrainerState.load_from_json(str(folder / STATE))
    except (OSError, ValueError, TypeError) as error:
        raise CorruptCheckpoint(
            f"{folder} is no whole checkpoint, because the process ended while it was being saved: resume from the one "
            "before it"
        ) from error


def newest_whole(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of an output folder, with a warning for every newer one that is not.

    Args:
        folder: Trainer's ``output_dir``.

    Returns:
        The checkpoint; None where there is none at all.

    Raises:
        CorruptCheckpoint: There are checkpoints, and none of them is whole.
    """
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            refuse_incomplete(path)
        except (CorruptCheckpoint, InvalidArgument) as error:
            warnings.warn(f"{error}; going back to the one before it", stacklevel=3)
        else:
            return path
    if found:
        raise CorruptCheckpoint(f"none of the {len(found)} checkpoints in {folder} is whole: start in an empty one")
    return None


def to_resume(asked: str | bool | os.PathLike[str] | None, output: Path) -> Path | None:
    """Return the checkpoint that a run is to go on from.

    Args:
        asked: What ``train`` was given: a path, True for the newest whole one, or nothing.
        output: Trainer's ``output_dir``.

    Returns:
        The checkpoint; None to begin anew.

    Raises:
        CorruptCheckpoint: It is not whole, or none is.
        InvalidArgument: It was saved by another trainer, or there is none.
    """
    if asked is None or asked is False:
        return None
    if asked is not True:
        refuse_incomplete(Path(asked))
        return Path(asked)
    found = newest_whole(output)
    if found is None:
        raise InvalidArgument(f"resume_from_checkpoint=True, but {output} holds no checkpoint: leave it out to begin")
    return found
