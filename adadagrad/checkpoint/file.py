"""One checkpoint file: plain values and tensors, written whole or not at all, checked before they are used.

A file is what `torch.save` writes of nested dicts, lists, tensors, numbers and words, so it loads with
``weights_only=True``. A manifest with the SHA-256 of every record is added to it (`manifest.py`) and verified before
anything is used, because one flipped bit in tensor data otherwise loads without an error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from adadagrad.checkpoint.manifest import damaged_record, seal
from adadagrad.core.errors import CorruptCheckpoint

VERSION = 1
"""Version of the content; a newer one is refused."""


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a checkpoint: to a temporary file beside it, to disk, then renamed over the old one.

    Args:
        path: The file.
        content: Nested dicts and lists of tensors, numbers, words and None.

    Raises:
        OSError: It could not be written; what was there under this name still is.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            _write(content, file, target)
        seal(temporary)
        write_through(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    write_through(target.parent)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, after verifying its checksums.

    Args:
        path: The file.

    Returns:
        The content, tensors on the CPU.

    Raises:
        CorruptCheckpoint: The file does not exist, is empty, truncated, damaged, not a checkpoint, or newer.
    """
    source = Path(path)
    if not source.is_file():
        raise CorruptCheckpoint(f"{source} does not exist: check the path, or start without resuming")
    try:
        damaged = damaged_record(source)
        content = None if damaged else torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptCheckpoint(f"{source} is not a readable checkpoint ({error}): use an earlier one") from error
    if damaged:
        raise CorruptCheckpoint(f"{source} is damaged (checksum of {damaged}): use an earlier one")
    if not isinstance(content, dict) or not isinstance(content.get("version"), int):
        raise CorruptCheckpoint(f"{source} is not a checkpoint of this library: it has no version")
    if content["version"] > VERSION:
        raise CorruptCheckpoint(
            f"{source} has version {content['version']}, this library reads up to {VERSION}: update the library"
        )
    return content


def _write(content: dict[str, Any], file: BinaryIO, target: Path) -> None:
    try:
        torch.save({"version": VERSION, **content}, file)
    except RuntimeError as error:
        cause = error.__context__  # torch closes its archive first, and complains of that instead
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, f"{target} could not be written: {cause.strerror}") from error


def write_through(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk.

    Args:
        path: The file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
