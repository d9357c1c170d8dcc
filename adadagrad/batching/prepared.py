"""From a DataLoader that a trainer has prepared for its ranks, back to the one that the user wrote."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)


@runtime_checkable
class Sharding(Protocol):
    """A batch sampler that hands a rank its part of another one's batches, as Accelerate's does."""

    batch_sampler: BatchSampler
    """The other one."""


@runtime_checkable
class Adapter(Protocol):
    """A loader around a loader, as ``Accelerator.prepare`` makes it."""

    base_dataloader: DataLoader[Any]
    """The loader inside."""


def plain_loader(loader: Any) -> DataLoader[Any]:
    """Return a plain loader with the data set, the workers and the shuffling of a prepared one.

    A trainer's preparation shares the batches out to its ranks, which the engine does itself, example by example. So
    its samplers are taken off again; what the user asked for, shuffled or in order, stays. What is the
    user's own (a sampler, a way of iterating, a data set without places) is kept as it is, and refused by the engine as
    it is without a trainer.

    Args:
        loader: A torch DataLoader, as it is or with the samplers of a trainer around the user's, or what Accelerate
            makes of it.

    Returns:
        The loader. No worker is started.

    Example:
        >>> from torch.utils.data import DistributedSampler
        >>> numbers = list(range(10))
        >>> shared = DataLoader(numbers, sampler=DistributedSampler(numbers, num_replicas=2, rank=1, shuffle=False))
        >>> type(plain_loader(shared).sampler).__name__
        'SequentialSampler'
    """
    inner = loader.base_dataloader if isinstance(loader, Adapter) else loader
    batches = inner.batch_sampler
    while isinstance(batches, Sharding):
        batches = batches.batch_sampler
    own_way = type(inner).__iter__ is not DataLoader.__iter__ or isinstance(inner.dataset, IterableDataset)
    if own_way or type(batches) is not BatchSampler:
        as_it_is: DataLoader[Any] = inner
        return as_it_is
    return DataLoader(
        inner.dataset,
        sampler=_users(batches.sampler, inner.dataset),
        num_workers=inner.num_workers,
        collate_fn=inner.collate_fn,
        pin_memory=inner.pin_memory,
        timeout=inner.timeout,
        worker_init_fn=inner.worker_init_fn,
        multiprocessing_context=inner.multiprocessing_context,
        prefetch_factor=inner.prefetch_factor,
        persistent_workers=inner.persistent_workers,
    )


def _users(sampler: Any, dataset: Any) -> Sampler[int]:
    """Return what a trainer's sampler stands for: the user's own, where that is one of torch's."""
    if type(sampler) is DistributedSampler:
        return RandomSampler(dataset) if sampler.shuffle else SequentialSampler(dataset)
    if isinstance(sampler, RandomSampler) and type(sampler).__module__ == "accelerate.data_loader":
        return RandomSampler(dataset, replacement=sampler.replacement, num_samples=sampler.num_samples)
    users: Sampler[int] = sampler
    return users
