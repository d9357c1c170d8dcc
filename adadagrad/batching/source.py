"""Where examples come from: an interface of chunks, so that nobody downstream knows about workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from adadagrad.batching.cursor import SampleOrder
from adadagrad.batching.leaves import slice_batch


@final
@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive examples of the stream, collated.

    Args:
        start: Position of the first one in the stream.
        stop: Position after the last one.
        batch: The collated examples; every leaf can be cut along its first dimension.
    """

    start: int
    stop: int
    batch: Any

    def part(self, start: int, stop: int) -> Any:
        """Return the examples at positions `start` to `stop` - 1, without copying a tensor."""
        if start == self.start and stop == self.stop:
            return self.batch
        return slice_batch(self.batch, start - self.start, stop - self.start)


class AbstractSource(ABC):
    """Delivers the stream in chunks, from any position on.

    Args:
        order: Which example stands where.
        stop: Position, in examples, after which no chunk is fetched ahead of its need: the run's budget. It is a
            hint that saves work: asking for more still works. None where there is no budget.
    """

    def __init__(self, order: SampleOrder, stop: int | None = None) -> None:
        self.order = order
        self.stop = stop

    @abstractmethod
    def chunk(self, start: int, count: int) -> Chunk:
        """Return a chunk that holds position `start`, as much of `count` examples from there as is convenient."""

    @abstractmethod
    def worker_pids(self) -> tuple[int, ...]:
        """Return the process ids of the loader's live workers, in order; empty without any."""

    @abstractmethod
    def close(self) -> None:
        """End all workers now. Asking for a chunk afterwards starts new ones; closing twice is harmless."""


@final
class MemorySource(AbstractSource):
    """Tensors in memory, indexed directly: every chunk is exactly what was asked for, so nothing is ever joined.

    Gives what ``DataLoader(TensorDataset(...))`` gives: a list with one tensor for each of the data set's, a copy.

    Args:
        order: Which example stands where.
        tensors: Their first dimensions agree; any device.
        rows: Which rows make up the data set, shape (N,) int64; None for all of them.
        pin_memory: Whether to copy into page-locked memory, for asynchronous transfers to an accelerator.
        stop: As for every source; nothing is fetched ahead here.
    """

    def __init__(
        self,
        order: SampleOrder,
        tensors: tuple[Tensor, ...],
        *,
        rows: Tensor | None = None,
        pin_memory: bool = False,
        stop: int | None = None,
    ) -> None:
        super().__init__(order, stop)
        self._tensors = tensors
        self._rows = rows
        self._pin_memory = pin_memory

    def chunk(self, start: int, count: int) -> Chunk:
        """Return exactly the examples at positions start .. start+count-1."""
        index = self.order.indices(start, count)
        if self._rows is not None:
            index = self._rows[index]
        batch = [tensor.index_select(0, index.to(tensor.device)) for tensor in self._tensors]
        if self._pin_memory:
            batch = [tensor.pin_memory() for tensor in batch]
        return Chunk(start, start + count, batch)

    def worker_pids(self) -> tuple[int, ...]:
        """Return nothing: there are no workers."""
        return ()

    def close(self) -> None:
        """Do nothing: there is nothing to end."""
