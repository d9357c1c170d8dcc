"""How a step is cut into micro-batches: evenly or greedily, and which of them are measured."""

from __future__ import annotations

from dataclasses import dataclass

from adadagrad.batching.plan import split_batch, split_units
from adadagrad.statistics import MicroBatch
from adadagrad.statistics.base import AbstractEstimator


@dataclass(frozen=True, slots=True)
class Split:
    """How a step's examples are cut into micro-batches, the measured ones first.

    Args:
        sizes: Examples in each micro-batch.
        measured: How many of the micro-batches are measured, from the first on.
    """

    sizes: tuple[int, ...]
    measured: int = 0


def plain_split(estimator: AbstractEstimator, size: int, micro_batch_size: int) -> Split:
    """Return the split of a step that is not measured.

    Args:
        estimator: What measures other steps: `MicroBatch` stands for a model that may mix examples.
        size: The step's examples.
        micro_batch_size: Most examples in one forward.

    Returns:
        The split.
    """
    # Where examples mix, a rest of one example would fail in BatchNorm, and a small one would be noisy there.
    even = isinstance(estimator, MicroBatch)
    return Split(split_units(size, micro_batch_size, 1) if even else split_batch(size, micro_batch_size))


def measured_split(estimator: AbstractEstimator, max_examples: int | None, size: int, micro_batch_size: int) -> Split:
    """Return the split of a step that is measured: enough units, or no more than so many examples, which come first.

    Args:
        estimator: What measures.
        max_examples: Most examples that are measured one by one; None for all.
        size: The step's examples, at least `smallest_batch`.
        micro_batch_size: Most examples in one forward.

    Returns:
        The split.
    """
    if isinstance(estimator, MicroBatch):
        sizes = split_units(size, micro_batch_size, min(estimator.units, size // 2))
        return Split(sizes, len(sizes))
    if max_examples is None or max_examples >= size:
        sizes = split_batch(size, micro_batch_size)
        return Split(sizes, len(sizes))
    sizes = split_batch(size, micro_batch_size, measured=max_examples)
    return Split(sizes, len(split_batch(max_examples, micro_batch_size)))


def smallest_batch(estimator: AbstractEstimator, *, errors: bool = False) -> int:
    """Return the fewest examples that make two units: two examples, or two micro-batches of two.

    Args:
        estimator: What measures.
        errors: Whether the measurement must say how sure it is, which takes a third unit.

    Returns:
        The number of examples.
    """
    units = 3 if errors else 2
    return 2 * units if isinstance(estimator, MicroBatch) else units
