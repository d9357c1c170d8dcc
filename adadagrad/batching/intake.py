"""What the user calls data becomes a source of chunks, or an error that says what to pass instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from adadagrad.batching.cursor import SampleOrder
from adadagrad.batching.loader import LoaderSource
from adadagrad.batching.source import AbstractSource, MemorySource
from adadagrad.core.checks import check_integer
from adadagrad.core.errors import EmptyDataset, InvalidArgument, OverriddenSampler, UnsizedDataset


@runtime_checkable
class MapStyleDataset(Protocol):
    """Anything indexed by 0 .. N-1: a torch Dataset, a Hugging Face one, a list of examples."""

    def __getitem__(self, index: int, /) -> Any:
        """Return one example."""
        ...


def make_source(
    data: Any,
    *,
    seed: int,
    chunk_size: int,
    stop: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    own_data: bool = False,
) -> AbstractSource:
    """Make the source of a run's examples from a data set or a DataLoader.

    A data set is shuffled. A loader is shuffled if it was made with ``shuffle=True``, and otherwise keeps the data
    set's order, in every epoch. A `TensorDataset` (also as a `Subset`, by `random_split`) is indexed directly;
    everything else goes through a DataLoader of ours with the loader's settings, or without workers.

    Args:
        data: A map-style data set, or a DataLoader over one.
        seed: The run's seed, for the order and for random augmentation.
        chunk_size: Examples fetched and collated together, the run's `micro_batch_size`. Smaller chunks cost more
            calls; larger ones more memory.
        stop: Position after which nothing is fetched ahead, the run's budget in examples.
        rank: This process's number among those that share the stream.
        ranks: How many there are.
        own_data: Whether `data` is this rank's alone.

    Returns:
        The source; its `order` knows the data set's size. No worker starts before the first chunk is asked for.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(10))
        >>> make_source(data, seed=0, chunk_size=4).order.size
        10
    """
    check_integer(1, chunk_size=chunk_size)
    loader = data if isinstance(data, DataLoader) else None
    dataset = data if loader is None else loader.dataset
    size = _size(dataset)
    shuffle = True if loader is None else _is_shuffled(loader, size)
    order = SampleOrder(size, seed, shuffle, rank=rank, ranks=ranks, own_data=own_data)
    stop = None if stop is None else order.before(stop)
    tensors, rows = _tensors(dataset)
    if tensors and (loader is None or (loader.num_workers == 0 and loader.collate_fn is default_collate)):
        pin_memory = loader is not None and loader.pin_memory and torch.accelerator.is_available()
        return MemorySource(order, tensors, rows=rows, pin_memory=pin_memory, stop=stop)
    return LoaderSource(dataset, order, chunk_size=chunk_size, loader=loader, stop=stop)


def _size(dataset: Any) -> int:
    """Return the data set's length, after checking that it is a data set and has one."""
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset):
        raise UnsizedDataset(
            f"data is an iterable data set ({name}), whose examples have no positions, so no order can be "
            f"seeded or resumed: pass a map-style data set, with __getitem__ and __len__"
        )
    if isinstance(dataset, tuple | Tensor):
        raise InvalidArgument(f"data must be a data set, got a {name}: pass TensorDataset(inputs, targets)")
    if isinstance(dataset, type | str | bytes | Mapping) or not isinstance(dataset, MapStyleDataset):
        raise InvalidArgument(f"data must be a map-style Dataset or a DataLoader, got {dataset!r:.80}")
    try:
        size = len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError) as error:
        raise UnsizedDataset(f"data has no length: give {name} a __len__ that counts its examples") from error
    if size == 0:
        raise EmptyDataset(f"data is empty: {name} has length 0, and training needs at least one example")
    return size


def _is_shuffled(loader: DataLoader[Any], size: int) -> bool:
    """Return whether a loader shuffles, after checking that nothing of its own would be lost."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise OverriddenSampler(
            f"data is a {type(loader).__name__}, whose own way of iterating would be replaced: pass its data "
            f"set, or a plain torch.utils.data.DataLoader"
        )
    if loader.batch_sampler is None:
        raise InvalidArgument(
            "data is a DataLoader with batch_size=None, which turns automatic batching off, but batches are made "
            "of single examples: pass the data set itself, or a DataLoader with any batch_size"
        )
    if type(loader.batch_sampler) is not BatchSampler:
        raise _overridden("batch_sampler", type(loader.batch_sampler).__name__)
    sampler = loader.batch_sampler.sampler
    if type(sampler) is SequentialSampler:
        return False
    if type(sampler) is not RandomSampler:
        raise _overridden("sampler", type(sampler).__name__)
    if sampler.replacement:
        raise _overridden("sampler", "RandomSampler with replacement=True")
    if sampler.num_samples != size:
        raise _overridden("sampler", f"RandomSampler with num_samples={sampler.num_samples}")
    return True


def _overridden(what: str, name: str) -> OverriddenSampler:
    return OverriddenSampler(
        f"{what} of data ({name}) would be replaced by the engine's own order, which shows every example once "
        f"an epoch: pass the data set itself, or a DataLoader with shuffle=True or shuffle=False. To train on a "
        f"part of the data, wrap it in torch.utils.data.Subset"
    )


def _tensors(dataset: Any) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return the tensors of a plain TensorDataset, and the rows that subsets of it select; () for others."""
    rows: Tensor | None = None
    while type(dataset) is Subset:
        indices = torch.as_tensor(dataset.indices)
        rows = indices if rows is None else indices[rows]
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return (), None
    if rows is not None:
        rows = torch.where(rows < 0, rows + len(dataset), rows)  # counted from the end, as a data set's own index is
    return dataset.tensors, rows
