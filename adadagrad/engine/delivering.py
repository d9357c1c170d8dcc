"""A step's micro-batches, from the stream to the model's device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adadagrad.batching.trees import map_leaves
from adadagrad.statistics.compiled import let_batch_size_vary

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch


def micro_batches(engine: AdaptiveBatch, sizes: tuple[int, ...]) -> Iterator[Any]:
    """Return the next examples of the stream on the model's device.

    Args:
        engine: The engine.
        sizes: Examples in each micro-batch.

    Returns:
        An iterator over batches of these sizes.
    """
    batches = engine._assembler.take(sizes)
    if engine.device.type == "cpu" and not engine._compiled:
        return batches

    def moved(path: tuple[str, ...], leaves: Sequence[Any]) -> Any:
        leaf = leaves[0]
        there = leaf.to(engine.device, non_blocking=True) if isinstance(leaf, Tensor) else leaf
        return let_batch_size_vary(there) if engine._compiled else there

    return (map_leaves(moved, (batch,)) for batch in batches)
