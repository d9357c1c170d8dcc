"""What a trainer has put around a loader comes off again; what is the user's own stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from adadagrad.batching.prepared import plain_loader

DATA = list(range(12))


class Part(BatchSampler):
    """Hands a rank every other batch, as Accelerate's does."""

    def __init__(self, batch_sampler: BatchSampler) -> None:
        self.batch_sampler = batch_sampler
        self.batch_size, self.drop_last = batch_sampler.batch_size, batch_sampler.drop_last

    def __iter__(self) -> Any:
        return iter(list(self.batch_sampler)[::2])


class Adapted:
    """A loader around a loader."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.base_dataloader = loader


@pytest.mark.parametrize("kind", [RandomSampler, SequentialSampler])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_ranks_part_becomes_the_whole_again(kind: Any, adapted: bool) -> None:
    loader: Any = DataLoader(DATA, batch_sampler=Part(Part(BatchSampler(kind(DATA), 4, True))))
    found = plain_loader(Adapted(loader) if adapted else loader)
    assert type(found.sampler) is kind
    assert type(found.batch_sampler) is BatchSampler
    assert sorted(int(index) for batch in found for index in batch) == DATA


@pytest.mark.parametrize(("shuffle", "kind"), [(True, RandomSampler), (False, SequentialSampler)])
def test_a_distributed_sampler_says_whether_the_user_shuffled(shuffle: bool, kind: type) -> None:
    sampler = DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=shuffle)  # type: ignore[var-annotated, arg-type]
    assert type(plain_loader(DataLoader(DATA, sampler=sampler)).sampler) is kind  # type: ignore[arg-type]


def collated(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def prepare_worker(number: int) -> None: ...


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_workers", 2),
        ("collate_fn", collated),
        ("pin_memory", True),
        ("timeout", 7.0),
        ("worker_init_fn", prepare_worker),
        ("multiprocessing_context", "spawn"),
        ("prefetch_factor", 5),
        ("persistent_workers", True),
    ],
)
def test_how_examples_are_fetched_stays(option: str, value: Any) -> None:
    options = {"num_workers": 1, option: value}
    found = getattr(plain_loader(DataLoader(DATA, batch_size=3, **options)), option)  # type: ignore[arg-type]
    assert found == value or type(found).__name__ == "SpawnContext"
    assert found != getattr(plain_loader(DataLoader(DATA, batch_size=3, num_workers=1)), option)  # type: ignore[arg-type]


class Streaming(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(DATA)


class OwnWay(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter(())


class OwnBatches(BatchSampler): ...


def test_what_is_the_users_own_is_left_to_be_refused() -> None:
    weighted = WeightedRandomSampler([1.0] * 12, 12)
    assert plain_loader(DataLoader(DATA, sampler=weighted)).sampler is weighted  # type: ignore[arg-type]
    for loader in (
        DataLoader(Streaming()),
        OwnWay(DATA),
        DataLoader(DATA, batch_size=None),  # type: ignore[arg-type]
        DataLoader(DATA, batch_sampler=OwnBatches(SequentialSampler(DATA), 3, False)),  # type: ignore[arg-type]
    ):
        assert plain_loader(loader) is loader
