"""How a step is cut into micro-batches: evenly or greedily, which of them are measured, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from adadagrad.batching.cursor import SampleOrder
from adadagrad.batching.plan import split_batch, split_units
from adadagrad.statistics import MicroBatch, Worker
from adadagrad.statistics.base import AbstractEstimator

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """The stretch of the stream that a step covers, and what every rank has of it.

    Args:
        order: The stream, with this rank's place in it.
        start: Position of the step's first example, counted over all ranks.
        size: Examples of the step, over all ranks.
        aligned: Whether all ranks must run as many micro-batches.
        apart: Whether each rank makes as many units as if it were alone: under local steps, and of a sharded model.
        whole: Whether every micro-batch has `micro_batch_size` examples, but a rank's last one of an epoch.
    """

    order: SampleOrder
    start: int
    size: int
    aligned: bool = False
    apart: bool = False
    whole: bool = False

    def of(self, count: int, rank: int | None = None) -> int:
        """Return how many of the stretch's first `count` examples are a rank's; None for this one's."""
        return self.order.before(self.start + count, rank) - self.order.before(self.start, rank)

    @property
    def own(self) -> int:
        """This rank's examples."""
        return self.of(self.size)

    @property
    def most(self) -> int:
        """Examples of the rank that has the most."""
        return -(-self.size // self.order.ranks)

    def cut(self, first: int, stop: int, cut: Callable[[int], Sizes]) -> Sizes:
        """Cut this rank's part of the stretch's examples `first` to `stop` - 1 into micro-batches.

        Args:
            first: Where they begin, counted in the stretch.
            stop: Where they end.
            cut: Cuts a number of examples >= 1.

        Returns:
            Their sizes. Where ranks are aligned, a micro-batch of 0 examples stands at the end on the ranks that would
            have fewer than another; it runs with the weight 0.
        """
        own = self.of(stop) - self.of(first)
        sizes = cut(own) if own else ()
        if self.aligned:
            ranks = range(self.order.ranks)
            parts = {self.of(stop, rank) - self.of(first, rank) for rank in ranks}
            sizes += (0,) * (max(len(cut(part)) if part else 0 for part in parts) - len(sizes))
        return sizes


@dataclass(frozen=True, slots=True)
class Split:
    """How a rank's examples of a step are cut into micro-batches, the measured ones first.

    Args:
        sizes: Examples in each micro-batch; 0 for one that is run for the other ranks' sake, with the weight 0.
        measured: How many of the micro-batches are measured, from the first on.
        several: Whether any rank may have more than one; the same on all ranks.
    """

    sizes: Sizes
    measured: int = 0
    several: bool = True


def plain_split(estimator: AbstractEstimator, share: Share, micro_batch_size: int) -> Split:
    """Return the split of a step that is not measured.

    Args:
        estimator: What measures other steps: `MicroBatch` stands for a model that may mix examples.
        share: The step's examples.
        micro_batch_size: Most examples in one forward.

    Returns:
        The split.
    """

    # Where examples mix, a rest of one example would fail in BatchNorm, and a small one would be noisy there.
    def cut(size: int) -> Sizes:
        even = isinstance(estimator, MicroBatch | Worker) and not share.whole
        return split_units(size, micro_batch_size, 1) if even else split_batch(size, micro_batch_size)

    return Split(share.cut(0, share.size, cut) or (0,), several=share.most > micro_batch_size)


def measured_split(
    estimator: AbstractEstimator, max_examples: int | None, share: Share, micro_batch_size: int
) -> Split:
    """Return the split of a step that is measured: enough units, or no more than so many examples, which come first.

    Args:
        estimator: What measures.
        max_examples: Most examples that are measured one by one, over all ranks, but two on each; None for all. All
            are measured too where a rank might have no other example left, because its last micro-batch is the one
            that is synchronised.
        share: The step's examples, at least `smallest_batch`.
        micro_batch_size: Most examples in one forward.

    Returns:
        The split.
    """
    ranks = share.order.ranks
    if isinstance(estimator, Worker):
        plain = plain_split(estimator, share, micro_batch_size)
        return replace(plain, measured=len(plain.sizes))
    if isinstance(estimator, MicroBatch) and share.whole:
        plain = plain_split(estimator, share, micro_batch_size)
        return replace(plain, measured=len(plain.sizes))
    if isinstance(estimator, MicroBatch):
        units = estimator.units if share.apart else -(-estimator.units // ranks)

        def even(size: int) -> Sizes:
            return split_units(size, micro_batch_size, max(1, min(units, size // 2)))

        sizes = share.cut(0, share.size, even)
        return Split(sizes, len(sizes))

    def full(size: int) -> Sizes:
        return split_batch(size, micro_batch_size)

    part = share.size if max_examples is None else max(max_examples, 2 * ranks)
    if share.whole:
        part = -(-part // (micro_batch_size * ranks)) * micro_batch_size * ranks
    if part + ranks > share.size:
        sizes = share.cut(0, share.size, full)
        return Split(sizes, len(sizes), several=share.most > micro_batch_size)
    measured = share.cut(0, part, full)
    return Split(measured + share.cut(part, share.size, full), len(measured))


def smallest_batch(
    estimator: AbstractEstimator, *, errors: bool = False, ranks: int = 1, apart: bool = False, whole: int = 0
) -> int:
    """Return the fewest examples that make two units: two examples, or two micro-batches of two.

    Args:
        estimator: What measures.
        errors: Whether the measurement must say how sure it is, which takes a third unit.
        ranks: How many ranks share a step; each has at least one example.
        apart: Whether each rank makes as many units as if it were alone.
        whole: Examples of every micro-batch where none may be split; 0 where they may.

    Returns:
        The number of examples.
    """
    units = 3 if errors else 2
    if apart and not isinstance(estimator, Worker):
        return ranks * smallest_batch(estimator, errors=errors, whole=whole)
    if whole and isinstance(estimator, MicroBatch):
        return max(ranks, units) * whole
    return max(ranks, 2 * units if isinstance(estimator, MicroBatch) else units)
