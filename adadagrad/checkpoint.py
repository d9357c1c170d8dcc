"""Checkpoints: plain values and tensors in one file, written whole or not at all, checked before they are used.

A file is what `torch.save` writes of nested dicts, lists, tensors, numbers and words, so it loads with
``weights_only=True``. Its zip records carry checksums, which `torch.load` does not look at; they are verified
here first, because one flipped bit in tensor data otherwise loads without an error.
"""

from __future__ import annotations

import os
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from adadagrad.core.errors import CorruptCheckpoint

VERSION = 1
"""Version of the content; a newer one is refused."""


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a checkpoint: to a temporary file beside it, to disk, then renamed over the old one.

    Args:
        path: The file.
        content: Nested dicts and lists of tensors, numbers, words and None.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
        with zipfile.ZipFile(source) as archive:
            damaged = archive.testzip()
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


def random_states() -> dict[str, Any]:
    """Return the states of all random number generators of this process, as plain values and tensors."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        states["numpy"] = [name, torch.tensor(keys.tolist()), position, has_gauss, float(cached)]
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put all random number generators back.

    Args:
        states: What `random_states` returned; generators that this process does not have are left out.
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    numpy = sys.modules.get("numpy")
    if "numpy" in states and numpy is not None:
        name, keys, position, has_gauss, cached = states["numpy"]
        numpy.random.set_state((name, keys.tolist(), position, has_gauss, cached))
