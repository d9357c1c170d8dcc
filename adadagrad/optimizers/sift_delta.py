"""What fine-tuning has changed of a model, as a file of the changed entries alone, to be applied to the same start."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument, InvalidData, MissingExtra

FORMAT = "adadagrad-delta-1"


class Change(NamedTuple):
    """What has changed of a tensor.

    Args:
        shape: Of the tensor.
        places: (k,) which entries of the flattened tensor; None where all have changed.
        values: (k,) what they are now.
        before: (k,) what they were at the start.
    """

    shape: tuple[int, ...]
    places: Tensor | None
    values: Tensor
    before: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return the entries of a tensor that have changed.

        Args:
            tensor: Of the same shape.
        """
        flat = tensor.detach().cpu().flatten()
        return flat if self.places is None else flat[self.places.long()]

    def is_whole(self) -> bool:
        """Return whether the parts go together."""
        count, size = self.values.numel(), math.prod(self.shape)
        fits = self.values.shape == self.before.shape == (count,) and self.values.dtype == self.before.dtype
        if self.places is None:
            return fits and count == size
        if not fits or self.places.shape != (count,) or self.places.dtype not in (torch.int32, torch.int64):
            return False
        return count == 0 or (int(self.places.min()) >= 0 and int(self.places.max()) < size)


def save_delta(path: str | os.PathLike[str], model: nn.Module, start: Mapping[str, Tensor]) -> int:
    """Write the entries of a model's parameters and buffers that differ from a start, before and after.

    The file is in the safetensors format: for each changed tensor the places of changed entries in the flattened
    tensor, their values, and what they were; no places where all entries have changed, as in a new head. It is written
    beside `path` and renamed, so that it is whole or not there.

    Args:
        path: The file; an older one is replaced.
        model: The fine-tuned model.
        start: ``state_dict`` of the model before, copied before training.

    Returns:
        How many entries have changed.

    Raises:
        InvalidArgument: The start is of another model, or shares the model's memory and so has changed with it.
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
    shapes: dict[str, list[int]] = {}
    now = model.state_dict()
    if set(now) != set(start):
        other = sorted(set(now) ^ set(start))[0]
        raise InvalidArgument(f"start must hold the same tensors as the model, and {other} is in one of them only")
    count = 0
    for name, value in now.items():
        before = start[name]
        if not isinstance(value, Tensor):  # what a module keeps beside tensors is not trained
            continue
        if value.shape != before.shape or value.dtype != before.dtype:
            raise InvalidArgument(f"start holds {name} as {before.dtype} {tuple(before.shape)}: it is of another model")
        if value.numel() and value.device == before.device and value.data_ptr() == before.data_ptr():
            raise InvalidArgument(f"start shares the memory of {name} with the model: copy it before training")
        value, before = value.detach().cpu(), before.detach().cpu()
        places = (_bits(value) != _bits(before)).nonzero().flatten()
        if len(places):
            count += len(places)
            shapes[name] = list(value.shape)
            if len(places) < value.numel():
                content[f"{name}/places"] = places.to(torch.int32) if value.numel() < 2**31 else places
            content[f"{name}/values"] = value.flatten()[places]
            content[f"{name}/before"] = before.flatten()[places]
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    _safetensors().save_file(content, beside, metadata={"format": FORMAT, "shapes": json.dumps(shapes)})
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
    changes = _read(Path(path))
    tensors = model.state_dict()
    for name, change in changes.items():
        old, there = change.values if revert else change.before, tensors.get(name)
        if not isinstance(there, Tensor) or there.dtype != old.dtype or there.shape != change.shape:
            raise InvalidArgument(f"{path} changes {name}, which this model does not have, or has in another form")
        if not torch.equal(_bits(change.of(there)), _bits(old)):
            raise InvalidArgument(
                f"{path} was made from other values of {name}: load the model that was fine-tuned, at its start"
                f"{' plus this file' if revert else ''}"
            )
    for name, change in changes.items():
        new, there = (change.before if revert else change.values).to(tensors[name].device), tensors[name]
        if change.places is None:
            there.copy_(new.view(change.shape))
        else:
            there.put_(change.places.long().to(there.device), new)
    return sum(len(change.values) for change in changes.values())


def _read(path: Path) -> dict[str, Change]:
    """Read a file and see that it is a delta, whole."""
    _safetensors()
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            content: dict[str, Tensor] = {name: file.get_tensor(name) for name in list(file.keys())}
    except Exception as error:  # the library's own error class is made in Rust and differs between versions
        raise InvalidData(f"{path} cannot be read as a delta: {error}") from error
    if about.get("format") != FORMAT:
        raise InvalidData(f"{path} is no delta that save_delta wrote (format {about.get('format')!r})")
    try:
        shapes = {name: tuple(int(n) for n in shape) for name, shape in json.loads(about["shapes"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InvalidData(f"{path} does not say which shapes its tensors have: it is damaged") from error
    changes: dict[str, Change] = {}
    for name in sorted({*shapes, *(name.rpartition("/")[0] for name in content)}):
        parts = [content.get(f"{name}/{part}") for part in ("places", "values", "before")]
        places, values, before = parts
        if values is None or before is None or name not in shapes:
            raise InvalidData(f"{path} holds {name} in part only")
        changes[name] = Change(shapes[name], places, values, before)
        if not changes[name].is_whole():
            raise InvalidData(f"{path} holds {name} in parts that do not go together: it is damaged")
    return changes


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
