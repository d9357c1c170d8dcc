"""Every example of each epoch of the stream once, whatever the batch size does."""

from __future__ import annotations

import multiprocessing
from collections import UserDict
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import adadagrad as ada
from adadagrad.batching.trees import map_leaves
from adadagrad.core.errors import StepError
from tests.batching.cases import WORKERS, Numbers, many_workers, nested
from tests.engine.cases import WHOLE, Asks, Recording, Sizes, make_data, make_engine, make_model, train, weights

pytestmark = many_workers


def rows_seen(engine):
    """Train and return (rows, pids of the workers) of each step."""
    steps = []
    for step in engine:
        rows = []
        for batch in step:
            rows += batch[2].tolist()
            step.backward(F.cross_entropy(engine.model(batch[0]), batch[1]))
        steps.append((rows, engine._assembler.source.worker_pids()))
        step.update()
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("seed", range(5 if WHOLE else 2))
@pytest.mark.parametrize("boundary", ["cross", "short"])
def test_every_example_of_every_epoch_once_and_the_same_workers(workers, seed, boundary):
    data = DataLoader(make_data(), shuffle=True, num_workers=workers)
    policy = Sizes(largest=50, seed=seed)
    options = {"epochs": 3, "micro_batch_size": 8, "seed": seed, "epoch_boundary": boundary}
    engine = make_engine(make_model(), None, data, policy, **options)
    steps = rows_seen(engine)
    sizes = [len(rows) for rows, _ in steps]
    seen = [row for rows, _ in steps for row in rows]
    assert sum(a != b for a, b in pairwise(sizes)) >= 20
    assert any(a > b for a, b in pairwise(sizes))
    for epoch in range(3):
        assert sorted(seen[epoch * 203 : (epoch + 1) * 203]) == list(range(203))
    assert len(seen) == 609
    pids = {pids for _, pids in steps}
    assert len(pids) == 1
    assert len(next(iter(pids))) == workers
    assert multiprocessing.active_children() == []
    plan, seen_so_far, whole = 0, 0, True
    for size in sizes:  # a new size takes effect at the next step, whole; a cut batch decides nothing
        if whole:
            plan = int(policy.required_batch_size(ada.Observation(samples_seen=seen_so_far)))
        left = 203 - seen_so_far % 203 if boundary == "short" else 609 - seen_so_far
        assert size == min(plan, left)
        whole, seen_so_far = size == plan, seen_so_far + size


@pytest.mark.parametrize("workers", WORKERS)
def test_the_order_depends_on_neither_workers_nor_sizes(workers):
    def order(policy, micro_batch_size, source):
        engine = make_engine(make_model(), None, source, policy, micro_batch_size=micro_batch_size, epochs=2)
        return [row for rows, _ in rows_seen(engine) for row in rows]

    expected = order(ada.StagedBatch({0: 203}), 203, make_data())
    assert order(Sizes(seed=3), 8, DataLoader(make_data(), shuffle=True, num_workers=workers)) == expected
    assert order(Asks(lambda o: 5.0), 3, DataLoader(make_data(), shuffle=True, num_workers=workers)) == expected


def test_a_batch_crosses_epochs_so_that_only_the_last_one_is_short():
    engine = make_engine(make_model(), policy=ada.StagedBatch({0: 64}), epochs=4)
    sizes = [len(rows) for rows, _ in rows_seen(engine)]
    assert sizes == [64] * 12 + [4 * 203 - 12 * 64]


def test_epoch_boundary_short_cuts_there_and_decides_nothing():
    engine = make_engine(make_model(), policy=ada.StagedBatch({0: 64}), epochs=3, epoch_boundary="short")
    decisions = train(engine)
    assert [d.observation.global_batch_size for d in decisions] == [64, 64, 64, 11] * 3
    assert [d.reason for d in decisions][3::4] == ["short batch"] * 3
    assert {d.plan.global_batch_size for d in decisions} == {64}


def test_batches_larger_than_what_an_epoch_leaves_never_exceed_the_data_set():
    engine = make_engine(make_model(), None, make_data(30), Asks(lambda o: 1e6), epochs=7, measure=ada.Measure(every=1))
    steps = rows_seen(engine)
    assert max(len(rows) for rows, _ in steps) == 30
    seen = [row for rows, _ in steps for row in rows]
    for epoch in range(7):
        assert sorted(seen[30 * epoch : 30 * epoch + 30]) == list(range(30))


def interrupted(engine, breaks):
    """Train, leaving the loop in the middle of given steps; return the rows of the finished ones."""
    rows, breaks = [], dict(breaks)
    while engine.samples_seen < engine.total_samples:
        for step in engine:
            part, leave = [], breaks.pop(step.number, None)
            for index, batch in enumerate(step):
                part += batch[2].tolist()
                if leave == ("before", index):
                    break
                step.backward(F.cross_entropy(engine.model(batch[0]), batch[1]))
                if leave == ("after", index):
                    break
            if leave is not None:
                break
            step.update()
            rows += part
    return rows


@pytest.mark.parametrize(
    "measure",
    [None, ada.Measure(every=1), ada.Measure(every=3), ada.Measure(max_overhead=1.0, max_examples=5)],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_a_step_in_the_middle_undoes_it(measure, workers):
    def engine_for(data):
        model = make_model()
        policy = Asks(lambda o: 4 + 1000 * o.gradient.variance_trace % 20)
        options = {"measure": measure, "micro_batch_size": 3, "total_samples": 203}
        return make_engine(model, torch.optim.Adagrad(model.parameters(), lr=0.1), data, policy, **options)

    data = DataLoader(make_data(), shuffle=True, num_workers=workers)
    whole, broken = engine_for(data), engine_for(data)
    expected = interrupted(whole, {})
    breaks = {1: ("before", 0), 2: ("after", 0), 5: ("before", 1), 6: ("after", 1), 9: ("after", 0)}
    assert interrupted(broken, breaks) == expected
    assert sorted(expected) == list(range(203))
    assert torch.equal(weights(broken.model), weights(whole.model))
    assert broken.steps == whole.steps
    assert multiprocessing.active_children() == []


def test_a_step_that_was_run_but_not_updated_is_undone_by_leaving_the_loop():
    model = make_model()
    optimizer = Recording(model.parameters())
    engine = make_engine(model, optimizer, measure=ada.Measure(every=1), total_samples=100)
    before = weights(model)
    for step in engine:
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        break
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(before, weights(model))
    assert (engine.steps, engine.samples_drawn) == (0, 0)
    with pytest.raises(StepError):
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
    train(engine)
    assert engine.samples_seen == 100


@pytest.mark.parametrize("memory", [True, False])
def test_every_tensor_of_a_batch_comes_to_the_models_device(memory):
    """Also in named tuples, dataclasses and mappings that are no dict, as tokenizers return them."""

    def collate(examples):
        batch = nested(examples)
        return {**batch, "mapping": UserDict(x=batch["pair"].image)}

    data = make_data() if memory else DataLoader(Numbers(50), collate_fn=collate)
    model = make_model().to("meta")
    engine = make_engine(model, None, data, ada.ConstantBatch(6), micro_batch_size=4, total_samples=12)
    found = []

    def note(path, leaves):
        if isinstance(leaves[0], torch.Tensor):
            found.append(leaves[0].device.type)

    step = next(iterator := iter(engine))
    for batch in step:
        map_leaves(note, (batch,))
        break
    iterator.close()
    assert found == ["meta"] * (4 if memory else 7)
    if not memory:
        assert type(batch["mapping"]) is UserDict
        assert batch["record"].name == ["n0", "n1", "n2", "n3"]
        assert (batch["names"], batch["kind"]) == (("0", "1", "2", "3"), "numbers")
