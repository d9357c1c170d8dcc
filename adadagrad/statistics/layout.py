r"""Where the examples are: which dimension of every layer's input and output is the batch.

A layer whose input happens to have n rows need not have n examples: position ids ``arange(T)`` with T = n look
just like a batch, and taking their rows for examples gives wrong numbers without an error. So before the first
measured forward the model runs twice without gradients on n + 1 examples, the last one a copy: a dimension
that grows from n to n + 1 is the batch, and a layer where none grows is shared by all examples.

The two runs differ in the last example only and use the same random numbers, so the first n outputs must agree.
Where they do not, the model mixes examples (a batch normalisation written by hand, say), and no per-example
gradient exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from adadagrad.core.errors import BatchCoupledModule, InvalidMeasurement
from adadagrad.statistics.planner import LayerSize

CallKey = tuple[str, int]
"""A module's qualified name and the number of its call within one forward of the model, from 0."""

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose cost is that of a matrix product."""

TOLERANCE = 1e-4
"""Largest relative difference of outputs that still counts as equal; kernels are the same, so 0 is usual."""


@dataclass(slots=True)
class Layout:
    """What the two trial runs found.

    Args:
        trial: Shapes of input and output of every call with n + 1 examples, and the layer's size.
        sizes: What the cost model needs of every call.
        dims: Batch dimensions of input and output of every call, found when n examples come after n + 1.
        calibrated: Whether the trial runs have been made.
    """

    trial: dict[CallKey, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    sizes: dict[CallKey, LayerSize] = field(default_factory=dict)
    dims: dict[CallKey, tuple[int, int] | None] = field(default_factory=dict)
    calibrated: bool = False

    def batch_dims(self, key: CallKey, x: Tensor, y: Tensor, n: int) -> tuple[int, int] | None:
        """Return the batch dimensions of a call's input and output, None where it has none.

        Args:
            key: Name and call number.
            x: The input.
            y: The output.
            n: Examples in this forward.

        Returns:
            Two dimensions, or None for a call that is shared by all examples.

        Raises:
            KeyError: The trial runs did not see this call, or saw it with other dimensions.
        """
        if not self.calibrated:
            return (0, 0) if x.shape[:1] == y.shape[:1] == (n,) else None
        if key not in self.dims:
            trial_x, trial_y = self.trial[key]
            found = _grown_dim(trial_x, x.shape, n), _grown_dim(trial_y, y.shape, n)
            self.dims[key] = None if found[0] is None or found[1] is None else (found[0], found[1])
        dims = self.dims[key]
        if dims is not None and (x.shape[dims[0]], y.shape[dims[1]]) != (n, n):
            raise KeyError(key)
        return dims

    def note(self, key: CallKey, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        """Take in one layer call of a trial run.

        Args:
            key: Name and call number.
            layer: The module.
            x: Its input.
            y: Its output.
        """
        self.trial[key] = (x.shape, y.shape)
        weights = sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad and p.dim() > 1)
        channels = layer.weight.shape[0] if isinstance(layer, _PRODUCTS) else 1
        rows = max(1, y.shape[0]) if y.dim() else 1
        positions = max(1, y.numel() // (rows * channels))
        activations = (x.numel() + y.numel()) // rows
        self.sizes[key] = LayerSize(weights if isinstance(layer, _PRODUCTS) else 0, positions, activations)

    def calibrate(
        self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any], n: int
    ) -> None:
        """Run the model twice on n + 1 examples; `trial` is filled by whoever wraps the layers' forwards.

        Args:
            model: The model, for its buffers and devices.
            forward: The model's forward, with the layers' wrapped forwards inside.
            args: Its positional arguments, with n examples.
            kwargs: Its keyword arguments.
            n: Number of examples.

        Raises:
            InvalidMeasurement: The model does not run on n + 1 examples.
            BatchCoupledModule: An example's output depends on another example.
        """
        outputs = []
        for found in (self.trial, self.dims, self.sizes):
            found.clear()
        with _untouched(model), torch.no_grad():
            for last in (0, 1) if n > 1 else (0,):
                longer_args, longer_kwargs = tree_map(lambda leaf, row=last: _lengthened(leaf, n, row), (args, kwargs))
                try:
                    with torch.random.fork_rng(devices=_cuda_devices(model)):
                        outputs.append(forward(*longer_args, **longer_kwargs))
                except Exception as error:
                    raise InvalidMeasurement(
                        f"the batch dimension could not be found: the model fails on {n + 1} examples made from a "
                        f"batch of {n} ({error}). Use PerExample(calibrate=False) if the first dimension of every "
                        "layer's input and output is the batch, or MicroBatch()"
                    ) from error
        self.calibrated = True
        if n > 1 and not _agree(outputs[0], outputs[1], n):
            raise BatchCoupledModule(
                "an example's output depends on the other examples of its batch, so a per-example gradient does "
                "not exist; use estimator=MicroBatch()"
            )


def _grown_dim(longer: torch.Size, shape: torch.Size, n: int) -> int | None:
    """Return the only dimension that is n here and n + 1 in the trial run, None if there is not exactly one."""
    if len(longer) != len(shape):
        return None
    changed = [dim for dim, (a, b) in enumerate(zip(longer, shape, strict=True)) if a != b]
    if len(changed) != 1 or shape[changed[0]] != n or longer[changed[0]] != n + 1:
        return None
    return changed[0]


def _lengthened(leaf: Any, n: int, row: int) -> Any:
    """Return a tensor of n rows with row `row` appended; anything else as it is."""
    if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n:
        return torch.cat([leaf.detach(), leaf.detach()[row : row + 1]])
    return leaf


def _agree(left: Any, right: Any, n: int) -> bool:
    """Whether the first n rows of all floating-point outputs agree."""
    for a, b in zip(tree_leaves(left), tree_leaves(right), strict=True):
        if not (isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 0 and a.shape[0] == n + 1):
            continue
        scale = float(a[:n].abs().max())
        if float((a[:n] - b[:n]).abs().max()) > TOLERANCE * scale:
            return False
    return True


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put every buffer back as it was, whatever a forward in training mode did to it."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def _cuda_devices(model: nn.Module) -> list[int]:
    """Return the CUDA devices whose random state the model's forward may draw from."""
    found = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    return sorted(index for index in found if index is not None)
