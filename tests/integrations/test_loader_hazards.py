"""Changing a DataLoader's batch size while it runs: too late, or never, with torch's; at once with ours.

A test of the raw library that fails here is good news: it has been mended upstream, and the documentation can say so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

import adadagrad as ada

MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
BEFORE, AFTER = 8, 32


class Rows(Dataset[Any]):
    """Rows that say which they are, and which worker has read them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, int]:
        info = get_worker_info()
        return index, -1 if info is None else info.id


def raw(workers: int, *, drop_last: bool) -> list[int]:
    """Return the batch sizes after the fifth batch, at which the sampler's batch size is changed."""
    loader = DataLoader(Rows(4000), batch_size=BEFORE, num_workers=workers, drop_last=drop_last)
    sizes = []
    for number, (index, _) in enumerate(loader, 1):
        sizes.append(len(index))
        if number == 5:
            loader.batch_sampler.batch_size = AFTER  # type: ignore[union-attr]
        if number == 30:
            break
    return sizes[5:]


@MANY_WORKERS
@pytest.mark.parametrize(("workers", "lag"), [(0, 0), (2, 4), (4, 8)])
def test_raw_workers_deliver_old_sizes_as_long_as_they_have_some(workers: int, lag: int) -> None:
    sizes = raw(workers, drop_last=False)
    assert sizes == [BEFORE] * lag + [AFTER] * (25 - lag)  # lag: workers times prefetch_factor, which is 2


@MANY_WORKERS
@pytest.mark.parametrize("workers", [0, 2])
def test_raw_drop_last_ignores_the_change(workers: int) -> None:
    assert raw(workers, drop_last=True) == [BEFORE] * 25


def test_raw_batch_size_cannot_be_set() -> None:
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        DataLoader(Rows(8)).batch_size = 2


def ours(workers: int, *, drop_last: bool, epochs: int = 1) -> tuple[list[int], list[int], set[int], list[int]]:
    """Return planned sizes, delivered sizes, the workers that were seen and the examples in order."""
    model = nn.Linear(1, 1)
    loader = DataLoader(Rows(1003), batch_size=16, shuffle=True, num_workers=workers, drop_last=drop_last)
    policy = ada.StagedBatch("0:8 40:32 200:5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = ada.AdaptiveBatch(model, optimizer, loader, policy, micro_batch_size=16, epochs=epochs)
    planned, delivered, seen, order = [], [], set(), []
    for step in engine:
        count = 0
        for index, worker in step:
            count += len(index)
            order += index.tolist()
            seen |= set(worker.tolist())
            step.backward(model(index.float()[:, None]).mean())
        step.update()
        planned.append(step.global_batch_size)
        delivered.append(count)
    return planned, delivered, seen, order


@MANY_WORKERS
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_ours_changes_at_once_and_shows_every_example_once_an_epoch(workers: int, drop_last: bool) -> None:
    planned, delivered, seen, order = ours(workers, drop_last=drop_last, epochs=2)
    assert delivered == planned
    assert planned[:12] == [8] * 5 + [32] * 5 + [5] * 2
    assert seen == (set(range(workers)) if workers else {-1})
    assert sorted(order[:1003]) == sorted(order[1003:]) == list(range(1003))
    assert order[:1003] != order[1003:]
