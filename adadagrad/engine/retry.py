"""Running out of memory in a step: everything is put back, and the step is repeated in micro-batches of half the size.

The global batch stays what it was, the optimizer has not been called, and what the repeated step computes is what a
run with the smaller micro-batches from this step on would have computed, dropout and running statistics included. Only
NumPy's global generator is not put back: reading its state takes 0.1 ms, at every step, and models do not draw from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 1 << 16
"""Elements up to which a buffer is copied before every step."""

MESSAGES = ("can't allocate memory", "not enough memory")
"""Parts of what torch's CPU allocator says in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, on an accelerator or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


class Changing:
    """The tensors of a model that its forward may write to: buffers, and embedding tables with `max_norm`.

    Small ones are copied before every step. A large one (a mask, a table) is copied before the first step, and later
    only once it has been seen to change by its version counter, so that a constant costs nothing. Kernels of batch
    normalisation do not count versions, but what they write has one number for a channel, and so is small.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changing: set[int] = set()  # large tensors that have been seen to change, by identity
        self._versions: dict[int, int] = {}

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of a tensor and its copy, for those that may change in the step to come."""
        tensors = self._tensors()
        large = {id(tensor): tensor._version for tensor in tensors if tensor.numel() > SMALL}
        moved = {key for key, version in large.items() if self._versions.get(key) != version}
        copied = self._changing | moved
        self._changing |= moved if self._versions else set()
        self._versions = large
        return [(t, t.detach().clone()) for t in tensors if t.numel() <= SMALL or id(t) in copied]

    def unsaved(self, copies: list[tuple[Tensor, Tensor]]) -> bool:
        """Return whether a tensor has changed of which there is no copy."""
        saved = {id(tensor) for tensor, _ in copies}
        return any(id(t) not in saved and self._versions.get(id(t)) != t._version for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for module in self._model.modules():
            if module._buffers:
                found += [buffer for buffer in module._buffers.values() if buffer is not None]
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm:
                found.append(module.weight)
        return found


class Snapshot:
    """What a step may change before its update: random states, and the tensors that a forward writes to.

    Args:
        changing: The model's tensors.
        device: Where the model is; its generator is saved too.
    """

    def __init__(self, changing: Changing, device: torch.device) -> None:
        self._changing, self._tensors = changing, changing.copies()
        self._restore: list[Callable[[], Any]] = []
        state, python = torch.default_generator.get_state(), random.getstate()
        self._restore += [lambda: torch.default_generator.set_state(state), lambda: random.setstate(python)]
        if device.type == "cuda":
            there = torch.cuda.get_rng_state(device)
            self._restore.append(lambda: torch.cuda.set_rng_state(there, device))

    @property
    def complete(self) -> bool:
        """Whether everything that has changed since can be put back."""
        return not self._changing.unsaved(self._tensors)

    def restore(self) -> None:
        """Put everything back."""
        for restore in self._restore:
            restore()
        with torch.no_grad():
            for tensor, value in self._tensors:
                tensor.copy_(value)


def advice(micro_batch_size: int) -> str:
    """Return what to do where a step cannot be repeated.

    Args:
        micro_batch_size: The size with which it ran out of memory.
    """
    if micro_batch_size <= 1:
        return "one example needs more memory than there is: take a smaller model, or recompute activations"
    return f"resume from the last checkpoint with micro_batch_size={(micro_batch_size + 1) // 2}, or start with it"
