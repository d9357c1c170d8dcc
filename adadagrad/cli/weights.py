"""Weights from a file into a model: from a checkpoint of the engine, or a state dict that torch.save wrote."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from adadagrad.checkpoint import load_checkpoint
from adadagrad.core.errors import CorruptCheckpoint, InvalidArgument

WRAPPERS = ("module.", "_orig_mod.")
"""What wrapping for several processes, and compiling, put before every name."""

SHOWN = 3
"""Most names of weights in an error."""


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into a model, in place.

    Args:
        model: The model, on any device.
        path: A file that ``engine.save``, ``adadagrad train`` or ``torch.save(model.state_dict(), ...)`` wrote. Code in
            it is not run: it is loaded with ``weights_only=True``.

    Raises:
        CorruptCheckpoint: The file is missing, damaged, or neither of the two.
        InvalidArgument: The weights are those of another model.
    """
    content = _content(path)
    state: Any = load_checkpoint(path)["engine"]["model"] if isinstance(content.get("engine"), dict) else dict(content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        odd = ", ".join(map(str, list(state)[:SHOWN]))
        raise CorruptCheckpoint(
            f"--checkpoint {path} is no state dict of tensors alone (it holds {odd or 'nothing'}): save "
            "model.state_dict() by itself"
        )
    while prefix := _wrapper(model.state_dict(), state):
        consume_prefix_in_state_dict_if_present(state, prefix)
    _refuse_other_model(model.state_dict(), state, path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise InvalidArgument(f"--checkpoint {path} does not fit the model: {error}") from error


def _content(path: Path) -> Mapping[str, Any]:
    """What the file holds, its checksums verified where it has them."""
    if path.is_dir():
        raise CorruptCheckpoint(f"--checkpoint {path} is a folder: give a file, such as {path / 'checkpoint.pt'}")
    if not path.is_file():
        raise CorruptCheckpoint(f"--checkpoint {path} does not exist: check the path")
    try:
        damaged = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptCheckpoint(
            f"--checkpoint {path} is damaged, or holds something else than weights ({type(error).__name__}): give a "
            "file of engine.save, or of torch.save(model.state_dict(), ...)"
        ) from error
    if damaged:
        raise CorruptCheckpoint(f"--checkpoint {path} is damaged (checksum of {damaged}): use an earlier one")
    if not isinstance(content, Mapping):
        raise CorruptCheckpoint(
            f"--checkpoint {path} holds a {type(content).__name__}: give a file of engine.save, or of "
            "torch.save(model.state_dict(), ...)"
        )
    return content


def _wrapper(own: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """The prefix that wrapping has put before all names; None where there is none, or the model has it itself."""
    if any(name in own for name in state):
        return None
    return next((prefix for prefix in WRAPPERS if all(str(name).startswith(prefix) for name in state)), None)


def _refuse_other_model(own: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Say in one line how names and shapes differ, and why they might."""
    lacking, foreign = [name for name in own if name not in state], [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and isinstance(own[name], Tensor) and own[name].shape != state[name].shape
    ]
    parts = [
        f"{what}{', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' * (len(names) > SHOWN)}"
        for what, names in (("it lacks ", lacking), ("it holds also ", foreign), ("", shapes))
        if names
    ]
    if parts:
        raise InvalidArgument(
            f"--checkpoint {path} is of another model ({'; '.join(parts)}): give the --model and --data that it was "
            "trained with, or the --config of its run"
        )
