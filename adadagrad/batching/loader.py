"""A DataLoader that is started once and then left alone, whatever the batch size does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch.utils.data import DataLoader, Sampler, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from adadagrad.batching.cursor import SampleOrder
from adadagrad.batching.leaves import check_batch
from adadagrad.batching.seeding import SeededDataset
from adadagrad.batching.source import AbstractSource, Chunk
from adadagrad.core.mixing import seed_for

_END = object()


@final
class LoaderSource(AbstractSource):
    """Any map-style data set, fetched in chunks of one fixed size by one DataLoader iterator.

    Chunk k holds the stream's positions k*C .. (k+1)*C - 1, wherever a run starts or resumes. So what a collate
    function makes of a chunk (its padding, its random masking) is the same after a resume with the same C.
    A seek outside the chunks that come next begins fetching anew, with the same workers.

    The user's loader gives `num_workers`, `collate_fn`, `pin_memory`, `timeout`, `worker_init_fn`,
    `multiprocessing_context` and `prefetch_factor`. Its `batch_size` and `drop_last` have no meaning here:
    batches are cut from chunks, and no example is dropped. Its `generator` has none either: the order follows
    from the run's seed, and so does the workers' base seed, so that starting them draws nothing from torch's
    global generator. Workers persist and chunks come in order, whatever the loader says.

    Args:
        dataset: A map-style data set.
        order: Which example stands where.
        chunk_size: C, examples a chunk, >= 1.
        loader: The user's loader, if there is one.
        stop: Position after which nothing is fetched ahead.
    """

    def __init__(
        self,
        dataset: Any,
        order: SampleOrder,
        *,
        chunk_size: int,
        loader: DataLoader[Any] | None = None,
        stop: int | None = None,
    ) -> None:
        super().__init__(order, stop)
        self.chunk_size = chunk_size
        collate_fn = default_collate if loader is None else loader.collate_fn
        self._dataset = SeededDataset(dataset, order.seed, collate_fn)
        self._options = _loader_options(loader)
        self._keys = _ChunkKeys(order, chunk_size)
        self._loader: DataLoader[Any] | None = None
        self._iterator: Iterator[Any] | None = None
        self._upcoming = -1

    def chunk(self, start: int, count: int) -> Chunk:
        """Return the chunk that holds position `start`, whatever `count` is.

        Args:
            start: A position in the stream.
            count: Not used: the chunks are fixed.

        Returns:
            C examples.
        """
        first = start - start % self.chunk_size
        iterator = self._iterator
        if iterator is None or first != self._upcoming:
            iterator = self._begin(first)
        self._upcoming = -1  # if fetching fails, the next attempt begins here again
        batch = next(iterator, _END)
        if batch is _END:  # the budget is used up and more is needed all the same
            batch = next(self._begin(first))
        check_batch(batch, self.chunk_size)
        self._upcoming = first + self.chunk_size
        return Chunk(first, self._upcoming, batch)

    def worker_pids(self) -> tuple[int, ...]:
        """Return the process ids of the live workers, in order; empty before the first chunk."""
        if not isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            return ()
        return tuple(worker.pid for worker in self._iterator._workers if worker.pid is not None)

    def close(self) -> None:
        """End the workers and wait for them. DataLoader has no public way, and collection may come late."""
        if isinstance(self._iterator, _MultiProcessingDataLoaderIter):
            self._iterator._shutdown_workers()
        self._loader = self._iterator = None

    def _begin(self, first: int) -> Iterator[Any]:
        """Let chunks come from position `first` on, from the workers that already live if there are any."""
        self._keys.start = first
        self._keys.stop = self.stop if self.stop is not None and first < self.stop else None
        if self._loader is None:
            generator = torch.Generator().manual_seed(seed_for(self.order.seed))
            self._loader = DataLoader(
                self._dataset,
                batch_size=None,
                sampler=self._keys,
                collate_fn=_as_it_is,
                generator=generator,
                **self._options,
            )
        self._iterator = iter(self._loader)
        return self._iterator


class _ChunkKeys(Sampler[list[tuple[int, int]]]):
    """Yields the keys of one chunk after the other, from `start` to `stop`, or without end."""

    def __init__(self, order: SampleOrder, chunk_size: int) -> None:
        self.order = order
        self.chunk_size = chunk_size
        self.start = 0
        self.stop: int | None = None

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.start
        while self.stop is None or position < self.stop:
            yield self.order.locate(position, self.chunk_size)
            position += self.chunk_size


def _loader_options(loader: DataLoader[Any] | None) -> dict[str, Any]:
    if loader is None:
        return {}
    options: dict[str, Any] = {"pin_memory": loader.pin_memory and torch.accelerator.is_available()}
    if loader.num_workers > 0:
        options |= {
            "num_workers": loader.num_workers,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": True,
        }
    return options


def _as_it_is(batch: Any) -> Any:
    """Return a chunk that is collated already (a function of the module, so that workers can be spawned)."""
    return batch
