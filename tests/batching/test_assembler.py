from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from adadagrad.batching import Assembler, make_source
from adadagrad.core.errors import BatchShapeError, InvalidArgument
from tests.batching.cases import (
    WORKERS,
    Numbers,
    Pair,
    Record,
    assemble,
    load,
    many_workers,
    nested,
    padded,
    random_sizes,
)

pytestmark = many_workers

SIZE = 101


def numbers(batches):
    return [i for batch in batches for i in batch[0].tolist()]


def data_of(workers, **options):
    return load(Numbers(SIZE), workers, **options)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", WORKERS)
def test_each_example_once_an_epoch_under_random_growth_and_shrinkage(workers, drop_last):
    """The loaders of other libraries lose examples here; with `drop_last` their last batch too."""
    assembler = assemble(data_of(workers, drop_last=drop_last, batch_size=16))
    seen = []
    for size in random_sizes(3 * SIZE, seed=workers):
        (batch,) = assembler.take([size])
        assert len(batch[0]) == size
        seen += batch[0].tolist()
    assembler.source.close()
    for epoch in range(3):
        assert Counter(seen[epoch * SIZE : (epoch + 1) * SIZE]) == Counter(range(SIZE))
    assert seen[:SIZE] != seen[SIZE : 2 * SIZE]


@pytest.mark.parametrize("workers", [2, 4])
def test_the_same_workers_live_through_20_changes(workers):
    assembler = assemble(data_of(workers), chunk_size=4)
    assert assembler.source.worker_pids() == ()
    pids, fetchers = set(), set()
    for step in range(20):
        for batch in assembler.take([1 + step % 7, 2 * step + 1]):
            fetchers |= set(batch[1].tolist())
        pids.add(assembler.source.worker_pids())
    assert len(pids) == 1
    assert len(*pids) == workers
    assert fetchers == set(*pids)
    assert assembler.epoch >= 4
    assembler.source.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_new_size_takes_effect_at_once(workers):
    """A DataLoader whose batch sampler is changed follows workers * prefetch_factor batches late."""
    assembler = assemble(data_of(workers, prefetch_factor=2 if workers else None), chunk_size=8)
    got = [len(batch[0]) for size in [8] * 5 + [32] + [3] * 3 for batch in assembler.take([size])]
    assembler.source.close()
    assert got == [8] * 5 + [32] + [3] * 3


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 300])
def test_batches_depend_on_neither_workers_nor_chunks(workers, chunk_size):
    sizes = random_sizes(230, seed=1)
    reference = list(assemble(data_of(0), chunk_size=32).take(sizes))
    assembler = assemble(data_of(workers), chunk_size=chunk_size)
    for batch, expected in zip(assembler.take(sizes), reference, strict=True):
        assert torch.equal(batch[0], expected[0])
    assembler.source.close()


@pytest.mark.parametrize("make", [data_of, lambda _: TensorDataset(torch.arange(SIZE))], ids=["loader", "memory"])
def test_seeking_to_any_position_continues_the_same_stream(make):
    whole = numbers(assemble(make(0), chunk_size=8).take([2 * SIZE + 40]))
    assembler = assemble(make(0), chunk_size=8)
    for position in [*range(2 * SIZE, -1, -1), *range(0, 2 * SIZE, 9)]:
        assembler.seek(position)
        assert numbers(assembler.take([1, 13])) == whole[position : position + 14]
        assert assembler.position == position + 14


def test_seeking_with_workers_keeps_them_and_resuming_starts_where_the_state_says():
    whole = numbers(assemble(data_of(0)).take([2 * SIZE]))
    assembler = assemble(data_of(2), chunk_size=8)
    list(assembler.take([5]))
    pids = assembler.source.worker_pids()
    for position in (100, 0, 37, SIZE):
        assembler.seek(position)
        assert numbers(assembler.take([3, 20])) == whole[position : position + 23]
    assert assembler.source.worker_pids() == pids
    state = assembler.state_dict()
    assembler.source.close()
    resumed = assemble(data_of(2), chunk_size=11)
    resumed.load_state_dict(state)
    assert numbers(resumed.take([10])) == whole[SIZE + 23 : SIZE + 33]
    resumed.source.close()


@pytest.mark.parametrize("resume_at", [SIZE - 1, SIZE, SIZE + 1])
def test_a_resume_at_an_epochs_end_neither_repeats_nor_loses_it(resume_at):
    whole = numbers(assemble(data_of(0)).take([2 * SIZE]))
    first = assemble(data_of(0))
    list(first.take([resume_at]))
    second = assemble(data_of(0))
    second.load_state_dict(first.state_dict())
    assert numbers(second.take([2 * SIZE - resume_at])) == whole[resume_at:]


def test_a_batch_crosses_from_one_epoch_to_the_next():
    assembler = assemble(TensorDataset(torch.arange(10)))
    first = numbers(assembler.take([7]))
    assert (assembler.epoch, assembler.until_epoch_end) == (0, 3)
    (batch,) = assembler.take([8])
    assert sorted(first + batch[0][:3].tolist()) == list(range(10))
    assert (assembler.epoch, assembler.until_epoch_end) == (1, 5)
    (batch,) = assembler.take([35])
    assert Counter(batch[0][5:].tolist()) == Counter([*range(10)] * 3)


@given(st.integers(1, 30), st.integers(1, 12), st.lists(st.integers(1, 25), min_size=1, max_size=12))
def test_any_sizes_deliver_the_stream_in_order(size, chunk_size, sizes):
    for data in (load(Numbers(size)), TensorDataset(torch.arange(size))):
        assembler = assemble(data, chunk_size=chunk_size, seed=9)
        batches = list(assembler.take(sizes))
        assert [len(batch[0]) for batch in batches] == sizes
        assert numbers(batches) == assembler.source.order.indices(0, sum(sizes)).tolist()


def test_the_position_counts_what_was_delivered_not_what_was_fetched():
    assembler = assemble(data_of(2), chunk_size=8)
    batches = assembler.take([3, 3, 3])
    assert assembler.position == 0
    next(batches)
    assert assembler.position == 3
    next(batches)
    batches.close()
    assert assembler.position == 6
    whole = assembler.source.order.indices(0, SIZE).tolist()
    assert numbers(assembler.take([4])) == whole[6:10]
    assembler.source.close()


def test_a_data_set_on_tensors_gives_what_its_loader_gives():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(40, 3, 2, generator=generator), torch.arange(40), torch.arange(40) > 5)
    part = Subset(Subset(data, range(5, 35)), [3, 1, 20, 9, 29, 0])
    from_the_end = Subset(Subset(data, [-1, 0, -40, 7]), [-1, 0, -4, 2])
    for dataset in (data, part, from_the_end):
        fast, slow = (
            assemble(dataset),
            assemble(load(dataset, collate_fn=lambda x: torch.utils.data.default_collate(x))),
        )
        assert type(fast.source) is not type(slow.source)
        for a, b in zip(fast.take([4, 1, 17]), slow.take([4, 1, 17]), strict=True):
            assert type(a) is type(b)
            assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_changing_a_batch_in_place_leaves_the_data_alone():
    x = torch.arange(6.0)
    for shuffle in (True, False):
        for batch in assemble(load(TensorDataset(x), shuffle=shuffle)).take([2, 2, 2]):
            batch[0].mul_(0)
    assert torch.equal(x, torch.arange(6.0))


def test_every_kind_of_branch_and_leaf_is_cut_and_joined():
    assembler = assemble(load(Numbers(30), collate_fn=nested, shuffle=False), chunk_size=4)
    start = 0
    for size in (3, 1, 2, 5, 9):
        (batch,) = assembler.take([size])
        x = torch.arange(start, start + size)
        assert list(batch) == ["pair", "tuple", "record", "names", "none", "kind"]
        assert isinstance(batch["pair"], Pair)
        assert torch.equal(batch["pair"].image, x)
        assert torch.equal(batch["pair"].label, x.double() / 2)
        first, (second, third) = batch["tuple"]
        assert torch.equal(first, x[:, None] + torch.arange(3))
        assert torch.equal(second, x * 10)
        assert torch.equal(third["deep"], x * 100)
        assert isinstance(batch["record"], Record)
        assert torch.equal(batch["record"].value, x + 1)
        assert batch["record"].name == [f"n{i}" for i in x.tolist()]
        assert batch["record"].split == "train"
        assert batch["names"] == tuple(str(i) for i in x.tolist())
        assert (batch["none"], batch["kind"]) == (None, "numbers")
        start += size


def test_a_batch_inside_a_chunk_is_a_view_and_one_across_chunks_a_copy():
    assembler = assemble(load(Numbers(40)), chunk_size=8)
    a, b, c, d = (batch[0] for batch in assembler.take([3, 5, 8, 9]))
    storage = a.untyped_storage().data_ptr()
    assert b.untyped_storage().data_ptr() == storage
    assert b.data_ptr() == a.data_ptr() + 3 * a.element_size()
    assert c.untyped_storage().nbytes() == 8 * c.element_size()
    assert d.untyped_storage().nbytes() == 9 * d.element_size()


def test_padded_chunks_of_different_lengths_cannot_be_joined():
    assembler = assemble(load(Numbers(40), collate_fn=padded, shuffle=False), chunk_size=4)
    assert [tuple(b["tokens"].shape) for b in assembler.take([3, 1, 4])] == [(3, 4), (1, 4), (4, 8)]
    message = r"batch\['tokens'\] is float32 tensor of shape \(4, 12\) in one chunk .* shape \(1, 16\).* pad to a fixed"
    for _ in range(2):
        with pytest.raises(BatchShapeError, match=message):
            list(assembler.take([5]))
        assert assembler.position == 8
    assert [len(b["tokens"]) for b in assembler.take([4])] == [4]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([-1], "sizes must be >= 0, got -1"),
        ([2.0], r"sizes must be an integer, got 2.0: write int\(...\) around it"),
        ([], "sizes must name at least one micro-batch, got none"),
    ],
)
def test_sizes_that_make_no_batch_are_refused_at_once(sizes, message):
    assembler = assemble(TensorDataset(torch.arange(9)))
    with pytest.raises(InvalidArgument, match=f"^{message}$"):
        assembler.take(sizes)
    assert assembler.position == 0


def test_a_consumed_chunk_is_let_go():
    assembler = assemble(load(Numbers(40)), chunk_size=8)
    list(assembler.take([8]))
    assert assembler._chunk is None
    list(assembler.take([9]))
    assert assembler._chunk is not None


@pytest.mark.parametrize("kind", ["memory", "loader"])
def test_a_micro_batch_of_none_shows_the_next_example_and_leaves_it_there(kind: str) -> None:
    data = TensorDataset(torch.arange(7)) if kind == "memory" else list(range(7))
    assembler = Assembler(make_source(data, seed=1, chunk_size=3))
    whole = [index for _, index in assembler.source.order.locate(0, 9)]
    taken = [torch.as_tensor(b[0] if kind == "memory" else b).tolist() for b in assembler.take([2, 0, 1, 0, 4])]
    assert taken == [whole[:2], [whole[2]], [whole[2]], [whole[3]], whole[3:7]]
    assert assembler.position == 7
