"""The trial runs that `calibration.py` reads: which examples, what is compared, and that the model stays as it was.

Two runs differ in their last example only and use the same random numbers and shapes, so the outputs of the
others must agree. Where they do not, the model mixes examples (a batch normalisation written by hand, say), and
no per-example gradient exists. Few examples are used, because the part of one in a mean over many is small.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

MOST_EXAMPLES = 4
"""Examples of the batch that the trial runs use, besides copies."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Each row of a tensor as one number, to see cheaply whether two tensors have the same rows in the same order.

    Args:
        values: A projection of each row, float64 (rows,).
        tolerance: Largest difference of two values that rounding explains.
    """

    values: Tensor
    tolerance: float

    @classmethod
    def of(cls, x: Tensor, dim: int) -> Fingerprint:
        """Return the fingerprint of a tensor's rows.

        Args:
            x: Any tensor.
            dim: The dimension that counts as rows.

        Returns:
            The fingerprint.
        """
        rows = x.detach().movedim(dim, 0).reshape(x.shape[dim], -1).double()
        weights = torch.cos(torch.arange(rows.shape[1], dtype=torch.float64, device=x.device))
        return cls(rows @ weights, _tolerance(x) * float(rows.abs().sum(1).amax()))

    def agrees(self, other: Fingerprint, m: int) -> bool:
        """Return whether the first m rows are the same."""
        return not bool(((self.values[:m] - other.values[:m]).abs() > self.tolerance).any())


def rows_to_try(arguments: Any, n: int) -> tuple[int, int | None]:
    """Choose examples for the trial runs.

    Args:
        arguments: The model's arguments, with n examples.
        n: Number of examples.

    Returns:
        m, the examples of every run, and the number of one that differs from example 0 (None if none does).
    """
    differs = torch.zeros(n, dtype=torch.bool)
    for leaf in tree_leaves(arguments):
        if _is_batch(leaf, n):
            differs |= (leaf != leaf[:1]).reshape(n, -1).any(1).cpu()
    different = differs.nonzero()
    return min(n, MOST_EXAMPLES), int(different[0]) if len(different) else None


def select(arguments: Any, n: int, rows: Sequence[int]) -> Any:
    """Return the arguments with these rows of every tensor of n rows; anything else as it is."""
    return tree_map(lambda leaf: leaf.detach()[list(rows)] if _is_batch(leaf, n) else leaf, arguments)


def agree(left: Any, right: Any, m: int) -> bool:
    """Return whether the first m rows of all floating-point outputs of two runs on m + 1 examples agree."""
    pairs = list(zip(tree_leaves(left), tree_leaves(right), strict=False))
    for a, b in pairs:
        if not (isinstance(a, Tensor) and a.is_floating_point() and a.numel() and a.shape[:1] == (m + 1,)):
            continue
        if a.shape != b.shape or bool(((a[:m] - b[:m]).abs() > _tolerance(a) * a[:m].abs().amax()).any()):
            return False
    return True


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put buffers and random states (torch's, Python's, NumPy's) back, whatever a forward in training mode does.

    So too the tables of embeddings with `max_norm`, whose lookups shorten the rows that they find too long.

    Args:
        model: The model.

    Yields:
        Nothing. The fused path of attention, which skips the layers, is off inside.
    """
    tables = (m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm)
    saved = [(tensor, tensor.detach().clone()) for tensor in (*model.buffers(), *tables)]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numbers = None if numpy is None else numpy.random.get_state()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # of checkpoints
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numbers)
        with torch.no_grad():
            for tensor, value in saved:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def grown_dim(shape: torch.Size, longer: torch.Size, rows: int) -> int | None:
    """Return the only dimension that grows from `rows` to one more, None if there is not exactly one."""
    if len(longer) != len(shape):
        return None
    changed = [dim for dim, (a, b) in enumerate(zip(shape, longer, strict=True)) if a != b]
    if len(changed) != 1 or shape[changed[0]] != rows or longer[changed[0]] != rows + 1:
        return None
    return changed[0]


def _is_batch(leaf: Any, n: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n


def _tolerance(x: Tensor) -> float:
    """Return the relative difference that rounding may make; the kernels are the same, so that 0 is usual."""
    return math.pow(torch.finfo(x.dtype).eps, 0.75) if x.is_floating_point() else 0.0
