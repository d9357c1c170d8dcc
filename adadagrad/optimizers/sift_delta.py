"""What fine-tuning has changed of a model, as a file of the changed entries alone, to be applied to the same start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument, InvalidData, MissingExtra

FORMAT = "adadagrad-delta-1"
PARTS = ("places", "values", "before")
"""What is written of each changed tensor."""


def save_delta(path: str | os.PathLike[str], model: nn.Module, start: Mapping[str, Tensor]) -> int:
    """Write the entries of a model's parameters and buffers that differ from a start, before and after.

    The file is in the safetensors format: for each changed tensor the places of changed entries in the flattened
    tensor, their values, and what they were. It is written beside `path` and renamed, so that it is whole or not there.

    Args:
        path: The file; an older one is replaced.
        model: The fine-tuned model.
        start: ``state_dict`` of the model before, copied before training.

    Returns:
        How many entries have changed.

    Raises:
        InvalidArgument: The start is of another model.
        MissingExtra: safetensors is not installed.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 2)
        >>> start = {name: value.clone() for name, value in model.state_dict().items()}
        >>> _ = model.weight.data[1, 2].add_(1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_delta(f"{folder}/delta.safetensors", model, start)
        1
    """
    content: dict[str, Tensor] = {}
    now = model.state_dict()
    if set(now) != set(start):
        other = sorted(set(now) ^ set(start))[0]
        raise InvalidArgument(f"start must hold the same tensors as the model, and {other} is in one of them only")
    count = 0
    for name, value in now.items():
        value, before = value.detach().cpu(), start[name].detach().cpu()
        if value.shape != before.shape or value.dtype != before.dtype:
            raise InvalidArgument(f"start holds {name} as {before.dtype} {tuple(before.shape)}: it is of another model")
        places = (_bits(value) != _bits(before)).nonzero().flatten()
        if len(places):
            count += len(places)
            content[f"{name}/places"] = places.to(torch.int32) if value.numel() < 2**31 else places
            content[f"{name}/values"] = value.flatten()[places]
            content[f"{name}/before"] = before.flatten()[places]
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    _safetensors().save_file(content, beside, metadata={"format": FORMAT})
    beside.replace(path)
    return count


@torch.no_grad()
def apply_delta(path: str | os.PathLike[str], model: nn.Module, *, revert: bool = False) -> int:
    """Bring a model from where fine-tuning started to where it ended, or back; bit for bit.

    Args:
        path: What `save_delta` wrote.
        model: A model whose changed entries are those of the start (of the end, for `revert`); nothing is changed
            where any differs.
        revert: Go back to the start instead.

    Returns:
        How many entries have changed.

    Raises:
        InvalidData: The file is missing, damaged or something else.
        InvalidArgument: The model is not the one that the file was made from.
        MissingExtra: safetensors is not installed.
    """
    content = _read(Path(path))
    names = sorted(name.removesuffix("/places") for name in content if name.endswith("/places"))
    tensors = model.state_dict()
    for name in names:
        places, old = content[f"{name}/places"].long(), content[f"{name}/{'values' if revert else 'before'}"]
        there = tensors.get(name)
        if there is None or there.dtype != old.dtype or (len(places) and int(places.max()) >= there.numel()):
            raise InvalidArgument(f"{path} changes {name}, which this model does not have, or has in another form")
        if not torch.equal(_bits(there.detach().cpu().flatten()[places]), _bits(old)):
            raise InvalidArgument(
                f"{path} was made from other values of {name}: load the model that was fine-tuned, at its start"
                f"{' plus this file' if revert else ''}"
            )
    for name in names:
        new = content[f"{name}/{'before' if revert else 'values'}"]
        there = tensors[name]
        there.put_(content[f"{name}/places"].long().to(there.device), new.to(there.device))
    return sum(len(content[f"{name}/places"]) for name in names)


def _read(path: Path) -> dict[str, Tensor]:
    """Read a file and see that it is a delta: every name three times, with tensors of one length."""
    _safetensors()
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            content: dict[str, Tensor] = {name: file.get_tensor(name) for name in list(file.keys())}
    except Exception as error:  # the library's own error class is made in Rust and differs between versions
        raise InvalidData(f"{path} cannot be read as a delta: {error}") from error
    if found != FORMAT:
        raise InvalidData(f"{path} is no delta that save_delta wrote (format {found!r})")
    for name in content:
        stem = name.rpartition("/")[0]
        lengths = {len(content[f"{stem}/{part}"]) if f"{stem}/{part}" in content else -1 for part in PARTS}
        if len(lengths) != 1 or -1 in lengths:
            raise InvalidData(f"{path} holds {stem} in part only")
    return content


def _bits(tensor: Tensor) -> Tensor:
    """Return a flat tensor as integers, so that NaN equals itself and -0 differs from 0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().flatten().view(sizes[tensor.element_size()])


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtra("safetensors", "sift") from error
    return safetensors.torch
