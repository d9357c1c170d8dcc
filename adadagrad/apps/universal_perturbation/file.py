"""A perturbation in a file: whole or not at all, verified by checksums, no code in it."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

from adadagrad.apps.universal_perturbation.perturbation import Perturbation
from adadagrad.checkpoint import load_checkpoint, save_checkpoint
from adadagrad.core.errors import CorruptCheckpoint, InvalidArgument

KIND = "universal_perturbation"
PLAIN = (bool, int, float, str)


def save_perturbation(path: str | os.PathLike[str], perturbation: Perturbation) -> None:
    """Write a perturbation, with all that is known of it, to compare later versions of a model with.

    Args:
        path: The file; an older one is replaced once the new one is whole.
        perturbation: What to write.

    Raises:
        InvalidArgument: It is no `Perturbation`, or its settings are not plain values.
        OSError: It could not be written.
    """
    if not isinstance(perturbation, Perturbation):
        raise InvalidArgument(f"perturbation must be a Perturbation, got a {type(perturbation).__name__}")
    for name, value in perturbation.settings.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, PLAIN)):
            raise InvalidArgument(f"settings must be plain values by name to be saved, got {name!r}: {value!r:.80}")
    content = {field.name: getattr(perturbation, field.name) for field in fields(Perturbation)}
    content["delta"] = content["delta"].clone()  # not the storage of which it may be a view
    content["settings"] = dict(content["settings"])
    save_checkpoint(path, {"kind": KIND, **content})


def load_perturbation(path: str | os.PathLike[str]) -> Perturbation:
    """Read a perturbation, after verifying its checksums; the file also opens with ``torch.load(weights_only=True)``.

    Args:
        path: The file.

    Returns:
        The perturbation as it was saved.

    Raises:
        CorruptCheckpoint: The file does not exist, is damaged, or holds something else.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = Perturbation(delta=torch.zeros(1, 2, 2), eps=0.1, method="by hand")
        ...     save_perturbation(f"{folder}/own.pt", made)
        ...     load_perturbation(f"{folder}/own.pt").eps
        0.1
    """
    content: dict[str, Any] = load_checkpoint(path)
    if content.get("kind") != KIND:
        raise CorruptCheckpoint(f"{os.fspath(path)} holds no perturbation: pass a file that save_perturbation wrote")
    names = [field.name for field in fields(Perturbation)]
    missing = [name for name in names if name not in content]
    if missing:
        raise CorruptCheckpoint(f"{os.fspath(path)} lacks {', '.join(missing)}: save the perturbation again")
    try:
        return Perturbation(**{name: content[name] for name in names})
    except InvalidArgument as error:
        raise CorruptCheckpoint(f"{os.fspath(path)} holds a perturbation that contradicts itself: {error}") from error
