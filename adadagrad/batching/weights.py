"""How many examples a batch holds: the weight with which its mean loss enters a step."""

from __future__ import annotations

from typing import Any

from adadagrad.batching.leaves import batch_lengths
from adadagrad.core.errors import BatchShapeError


def leading_size(batch: Any) -> int:
    """Return the number of examples in a collated batch.

    Args:
        batch: Any tree of mappings, sequences and dataclasses with tensors whose first dimension counts examples.

    Returns:
        The first dimension that all its tensors and lists share.

    Raises:
        BatchShapeError: They disagree, or there is none.

    Example:
        >>> import torch
        >>> leading_size({"x": torch.zeros(5, 3), "y": torch.zeros(5)})
        5
    """
    lengths = batch_lengths(batch)
    sizes = set(lengths.values())
    if len(sizes) != 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items()) or "no tensor at all"
        raise BatchShapeError(
            f"the leaves of a batch must share their first dimension, the number of examples; found {found}"
        )
    return sizes.pop()
