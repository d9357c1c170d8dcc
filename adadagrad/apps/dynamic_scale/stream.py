"""One stream of batches over a data set: a fixed number of images at a time, fetched ahead where there are workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from adadagrad.apps.dynamic_scale.targets import Target
from adadagrad.batching import Cursor, SampleOrder, SeededDataset
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.mixing import seed_for

Stitch = Callable[[Sequence[Tensor], Sequence[Target]], tuple[Any, list[Target]]]
Collate = Callable[[Any, list[Target]], Any]


@final
class ImageStream:
    """Deliver batch after batch of one kind, in an order that follows from the seed and the position alone.

    Workers start with the first batch, so a stream that is never asked costs nothing. What they fetch ahead is data of
    this stream; it holds no decision. Nothing is drawn from torch's global generator, and random augmentation inside
    the data set depends on (seed, epoch, index) only.

    Args:
        dataset: Map-style, of (image, target) pairs.
        order: Which image stands where.
        count: Images that this rank reads for one batch, >= 1.
        make: Makes a batch of a list of (image, target) pairs; runs in the worker.
        num_workers: Processes that fetch ahead; 0 fetches in this one.
    """

    def __init__(
        self, dataset: Any, order: SampleOrder, count: int, make: Callable[[list[Any]], Any], num_workers: int
    ) -> None:
        self.cursor = Cursor(order)
        self.count = count
        self._data = SeededDataset(dataset, order.seed, make)
        self._keys = _Keys(order, count)
        self._num_workers = num_workers
        self._loader: DataLoader[Any] | None = None
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        """Return the next batch, and go on by the images that all ranks have read for it."""
        if self._iterator is None:
            self._keys.start = self.cursor.own
            if self._loader is None:
                self._loader = DataLoader(
                    self._data,
                    batch_size=None,
                    sampler=self._keys,
                    collate_fn=_as_it_is,
                    num_workers=self._num_workers,
                    persistent_workers=self._num_workers > 0,
                    generator=torch.Generator().manual_seed(seed_for(self.cursor.order.seed)),
                )
            self._iterator = iter(self._loader)
        iterator, self._iterator = self._iterator, None  # if fetching fails, the next attempt begins at this batch
        batch = next(iterator)
        self._iterator = iterator
        self.cursor.seek(self.cursor.position + self.count * self.cursor.order.ranks)
        return batch

    def restart(self) -> None:
        """Forget what was fetched ahead: the cursor has been moved."""
        self._iterator = None

    def close(self) -> None:
        """End the workers and wait for them; asking for a batch afterwards starts new ones."""
        iterator = self._loader._iterator if self._loader is not None else None  # persistent workers hang on the loader
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()
        self._loader = self._iterator = None


@final
class MakeBatch:
    """Takes pairs apart, stitches them if the stream does, and collates them; a class, so that workers can be spawned.

    Args:
        stitch: None in the regular stream.
        collate: Makes what the loop receives of images and targets.
    """

    def __init__(self, stitch: Stitch | None, collate: Collate) -> None:
        self.stitch = stitch
        self.collate = collate

    def __call__(self, pairs: list[Any]) -> Any:
        """Return a batch.

        Args:
            pairs: (image, target) of each image.

        Raises:
            InvalidArgument: An example is no pair.
        """
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InvalidArgument(f"dataset must give (image, target) pairs, got {type(pair).__name__}")
        images, targets = [image for image, _ in pairs], [target for _, target in pairs]
        if self.stitch is None:
            return self.collate(images, targets)
        return self.collate(*self.stitch(images, targets))


class _Keys(Sampler[list[tuple[int, int]]]):
    """Yields the (epoch, index) pairs of one batch after the other, without end."""

    def __init__(self, order: SampleOrder, count: int) -> None:
        self.order = order
        self.count = count
        self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.start
        while True:
            yield self.order.locate(position, self.count)
            position += self.count


def _as_it_is(batch: Any) -> Any:
    return batch
