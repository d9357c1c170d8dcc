from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torch.utils.data.distributed import DistributedSampler

from adadagrad.batching import LoaderSource, MemorySource, make_source
from adadagrad.core.errors import EmptyDataset, InvalidArgument, OverriddenSampler, UnsizedDataset
from tests.batching.cases import Numbers, Stream, Unsized, assemble, load

data = Numbers(12)
tensors = TensorDataset(torch.arange(12))


class OwnSampler(SequentialSampler):
    pass


class OwnLoader(DataLoader):
    def __iter__(self):
        yield from ()


class OwnTensors(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)[0] + 1


def sampled(sampler):
    return DataLoader(data, sampler=sampler)


REFUSED = {
    "empty data set": (Numbers(0), EmptyDataset, "data is empty: Numbers has length 0"),
    "empty list": ([], EmptyDataset, "data is empty: list"),
    "empty tensors": (TensorDataset(torch.ones(0, 3)), EmptyDataset, "data is empty: TensorDataset"),
    "empty subset": (Subset(tensors, []), EmptyDataset, "data is empty: Subset"),
    "iterable": (Stream(), UnsizedDataset, r"iterable data set \(Stream\).*pass a map-style data set"),
    "loader of iterable": (DataLoader(Stream()), UnsizedDataset, r"iterable data set \(Stream\)"),
    "no length": (Unsized(), UnsizedDataset, "give Unsized a __len__"),
    "subset sampler": (
        sampled(SubsetRandomSampler([0, 1])),
        OverriddenSampler,
        r"sampler of data \(SubsetRandomSampler\) would be replaced .*Subset",
    ),
    "weighted sampler": (
        sampled(WeightedRandomSampler([1.0] * 12, 12)),
        OverriddenSampler,
        "WeightedRandomSampler",
    ),
    "ranks' sampler": (sampled(DistributedSampler(data, 2, 0)), OverriddenSampler, "DistributedSampler"),
    "own sampler": (sampled(OwnSampler(data)), OverriddenSampler, "OwnSampler"),
    "list of indices": (sampled([3, 1, 2]), OverriddenSampler, r"\(list\)"),
    "with replacement": (sampled(RandomSampler(data, True)), OverriddenSampler, "replacement=True"),
    "fewer samples": (sampled(RandomSampler(data, num_samples=5)), OverriddenSampler, "num_samples=5"),
    "batch sampler": (
        DataLoader(data, batch_sampler=[[0, 1], [2]]),
        OverriddenSampler,
        r"batch_sampler of data \(list\) would be replaced",
    ),
    "sampler in a batch sampler": (
        DataLoader(data, batch_sampler=BatchSampler(SubsetRandomSampler([1, 2]), 2, False)),
        OverriddenSampler,
        r"sampler of data \(SubsetRandomSampler\)",
    ),
    "own loader": (OwnLoader(data), OverriddenSampler, "data is a OwnLoader, whose own way of iterating"),
    "no batching": (
        DataLoader(data, batch_size=None),
        InvalidArgument,
        "batch_size=None.*pass the data set itself",
    ),
    "nothing": (None, InvalidArgument, "data must be a map-style Dataset or a DataLoader, got None"),
    "number": (5, InvalidArgument, "data must be a map-style Dataset or a DataLoader, got 5"),
    "iterator": (iter([1, 2]), InvalidArgument, "got <list_iterator"),
    "path": ("data/train", InvalidArgument, "got 'data/train'"),
    "mapping": ({"x": 1}, InvalidArgument, "got {'x': 1}"),
    "class": (Numbers, InvalidArgument, "got <class"),
    "tensor": (torch.ones(3, 2), InvalidArgument, r"got a Tensor: pass TensorDataset\(inputs, targets\)"),
    "tensors": ((torch.ones(3), torch.ones(3)), InvalidArgument, "got a tuple: pass TensorDataset"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_ordered_is_refused_with_a_remedy(name):
    value, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        make_source(value, seed=0, chunk_size=4)
    assert type(caught.value) is error


def test_a_chunk_holds_at_least_one_example():
    with pytest.raises(InvalidArgument, match=r"^chunk_size must be >= 1, got 0$"):
        make_source(data, seed=0, chunk_size=0)


@pytest.mark.parametrize(
    ("value", "kind", "shuffle"),
    [
        (data, LoaderSource, True),
        ([(1, 2), (3, 4)], LoaderSource, True),
        (DataLoader(data), LoaderSource, False),
        (DataLoader(data, shuffle=True), LoaderSource, True),
        (DataLoader(data, sampler=RandomSampler(data)), LoaderSource, True),
        (DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 3, True)), LoaderSource, False),
        (tensors, MemorySource, True),
        (DataLoader(tensors), MemorySource, False),
        (DataLoader(tensors, shuffle=True, batch_size=5, drop_last=True), MemorySource, True),
        (random_split(tensors, [8, 4])[0], MemorySource, True),
        (OwnTensors(torch.arange(5)), LoaderSource, True),
        (DataLoader(tensors, collate_fn=list), LoaderSource, False),
        (DataLoader(tensors, num_workers=1), LoaderSource, False),
    ],
)
def test_data_finds_the_way_that_suits_it(value, kind, shuffle):
    source = make_source(value, seed=5, chunk_size=4)
    assert type(source) is kind
    assert source.order.shuffle is shuffle
    assert source.order.seed == 5
    assert source.order.size == len(value.dataset if isinstance(value, DataLoader) else value)
    assert source.worker_pids() == ()
    source.close()


def test_a_loader_that_does_not_shuffle_keeps_the_data_sets_order():
    for dataset in (data, tensors):
        (batch,) = assemble(load(dataset, shuffle=False), chunk_size=5).take([24])
        assert batch[0].tolist() == [*range(12), *range(12)]
