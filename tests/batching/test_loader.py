from __future__ import annotations

import gc
import multiprocessing

import pytest
import torch
from torch.utils.data import get_worker_info

from adadagrad.core.errors import BatchShapeError
from tests.batching.cases import Fragile, Numbers, assemble, load, many_workers, noisy

pytestmark = many_workers


def first(batches):
    return [i for batch in batches for i in batch[0].tolist()]


def note_worker(worker_id):
    get_worker_info().dataset.dataset.size = 1000 + worker_id


class Sizes(Numbers):
    def __getitem__(self, index):
        return index, self.size


@pytest.mark.parametrize("workers", [2, 4])
def test_closing_ends_all_workers_and_may_be_undone(workers):
    assembler = assemble(load(Numbers(50), workers))
    a = first(assembler.take([5]))
    pids = assembler.source.worker_pids()
    assert {child.pid for child in multiprocessing.active_children()} == set(pids)
    assembler.source.close()
    assembler.source.close()
    assert multiprocessing.active_children() == []
    assert assembler.source.worker_pids() == ()
    a += first(assembler.take([45]))
    assert sorted(a) == list(range(50))
    assert set(assembler.source.worker_pids()).isdisjoint(pids)
    assembler.source.close()
    assert multiprocessing.active_children() == []


def test_a_source_that_is_forgotten_leaves_no_worker():
    assembler = assemble(load(Numbers(50), 2))
    list(assembler.take([5]))
    assert len(multiprocessing.active_children()) == 2
    del assembler
    gc.collect()
    assert multiprocessing.active_children() == []


def test_closing_ends_workers_that_a_traceback_still_refers_to():
    assembler = assemble(load(Numbers(50), 2))
    list(assembler.take([5]))
    held = assembler.source._iterator
    assembler.source.close()
    assert multiprocessing.active_children() == []
    assert held is not None


def test_closing_before_the_first_chunk_starts_nothing():
    source = assemble(load(Numbers(50), 2)).source
    source.close()
    assert multiprocessing.active_children() == []


def test_nothing_is_fetched_beyond_the_budget_yet_more_can_be_asked_for():
    asked = []

    class Listed(Numbers):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    for stop, expected in ((20, 24), (24, 24), (None, 24)):
        asked.clear()
        assembler = assemble(load(Listed(100)), chunk_size=8, stop=stop)
        list(assembler.take([20]))
        assert len(asked) == expected
        batches = list(assembler.take([30, 10]))
        assert first(batches) == assembler.source.order.indices(20, 40).tolist()


def test_workers_stop_at_the_budget_and_the_same_ones_go_beyond_it():
    assembler = assemble(load(Numbers(100), 2), chunk_size=8, stop=20)
    seen = first(assembler.take([20]))
    assert assembler.source._iterator._tasks_outstanding == 0
    pids = assembler.source.worker_pids()
    seen += first(assembler.take([80]))
    assert assembler.source.worker_pids() == pids
    assert sorted(seen) == list(range(100))
    assembler.source.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_example_that_fails_once_is_not_skipped(workers):
    assembler = assemble(load(Fragile(24, broken=13), workers, shuffle=False), chunk_size=4)
    seen = [i for batch in assembler.take([4, 4, 4]) for i in batch.tolist()]
    with pytest.raises(OSError, match="lost connection"):
        list(assembler.take([4]))
    assert assembler.position == 12
    if workers:  # the worker's copy of the data set has recovered; another worker's may not have
        assembler.source.close()
        assembler.source._dataset.dataset.broken = None
    seen += [i for batch in assembler.take([4, 8]) for i in batch.tolist()]
    assert seen == list(range(24))
    assembler.source.close()


def test_the_users_settings_are_taken_over():
    loader = load(
        Sizes(40), 2, worker_init_fn=note_worker, prefetch_factor=3, timeout=60, multiprocessing_context="fork"
    )
    assembler = assemble(loader, chunk_size=4)
    sizes = {n for batch in assembler.take([20]) for n in batch[1].tolist()}
    assert sizes == {1000, 1001}
    ours = assembler.source._loader
    assert (ours.prefetch_factor, ours.timeout, ours.multiprocessing_context) == (
        3,
        60,
        loader.multiprocessing_context,
    )
    assembler.source.close()


def test_workers_can_be_spawned():
    expected = list(assemble(load(Numbers(20), collate_fn=noisy)).take([7]))
    assembler = assemble(load(Numbers(20), 1, collate_fn=noisy, multiprocessing_context="spawn"))
    for a, b in zip(assembler.take([7]), expected, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assembler.source.close()
    assert multiprocessing.active_children() == []


COLLATED = {
    "a number": (lambda x: {"x": torch.ones(4), "tokens": 7}, r"batch\['tokens'\] \(int\) has no dimension"),
    "a 0-d tensor": (
        lambda x: [torch.ones(4), torch.tensor(1)],
        r"batch\[1\] \(int64 tensor of shape \(\)\) has no",
    ),
    "an array": (lambda x: {"x": torch.ones(4).numpy()}, r"batch\['x'\] \(numpy.ndarray\) has no dimension"),
    "an object": (lambda x: (torch.ones(4), object()), r"batch\[1\] \(object\) has no dimension"),
    "a set": (lambda x: {1, 2, 3, 4}, r"batch \(set\) has no dimension"),
    "a sparse tensor": (lambda x: torch.eye(4).to_sparse(), r"batch \(torch.sparse_coo tensor\) has no dimension"),
    "a nested tensor": (
        lambda x: torch.nested.nested_tensor([torch.ones(2)] * 4, layout=torch.jagged),
        r"batch \(nested tensor\) has no dimension",
    ),
    "too few": (
        lambda x: {"x": [torch.ones(3, 2)]},
        r"batch\['x'\]\[0\] has 3 rows \(float32 tensor of shape \(3, 2\)\)",
    ),
    "few names": (lambda x: (torch.ones(4), ["a"]), r"batch\[1\] has 1 rows \(list\) in a chunk of 4 examples"),
    "nothing": (lambda x: None, "collate_fn returned None for 4 examples, without a tensor"),
    "emptiness": (lambda x: {}, "collate_fn returned {} for 4 examples, without a tensor"),
    "a word": (lambda x: ("a", [None, {}]), "collate_fn returned .* for 4 examples, without a tensor|has 2 rows"),
}


@pytest.mark.parametrize("name", COLLATED)
@pytest.mark.parametrize("size", [4, 1])
def test_leaves_that_cannot_be_cut_are_named_wherever_the_batch_lies(name, size):
    collate_fn, message = COLLATED[name]
    assembler = assemble(load(Numbers(20), collate_fn=collate_fn), chunk_size=4)
    with pytest.raises(BatchShapeError, match=message):
        list(assembler.take([size]))
    assert assembler.position == 0


def growing(examples):
    return {"x": torch.ones(4), **({"late": torch.ones(4)} if examples[0][0] >= 4 else {})}


JOINED = {
    "dtype": (lambda x: torch.ones(4, dtype=torch.int64 if x[0][0] else torch.float32), "float32 .* int64"),
    "type": (
        lambda x: [torch.ones(4), torch.ones(4) if x[0][0] else [1, 2, 3, 4]],
        r"batch\[1\] is of different types",
    ),
    "word": (lambda x: [torch.ones(4), f"from {x[0][0]}"], r"batch\[1\] differs .* 'from 0' and 'from 4'"),
    "structure": (growing, r"batch has the entries \[\"\['x'\]\"\] in one chunk and others in the next"),
}


@pytest.mark.parametrize("name", JOINED)
def test_chunks_that_do_not_match_are_not_joined(name):
    collate_fn, message = JOINED[name]
    assembler = assemble(load(Numbers(8), collate_fn=collate_fn, shuffle=False), chunk_size=4)
    with pytest.raises(BatchShapeError, match=message):
        list(assembler.take([5]))
    assert len(list(assembler.take([4, 2, 2]))) == 3
