"""Memory that runs out in a step: the step is repeated in smaller micro-batches, and nothing else differs."""

from __future__ import annotations

import gc
import json
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adadagrad as ada
from adadagrad.core.errors import OutOfMemory
from adadagrad.engine.planning import plan_again
from tests.engine.cases import Sizes, make_data, make_engine, make_model, mean_loss, train, weights

ERRORS = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory"),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
}
FULL = ada.Measure(every=1, max_examples=None)


def with_batch_norm() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 3)).double()


KINDS = {
    "schedule": (lambda: make_model(0.3), {"policy": Sizes()}),
    "norm test": (lambda: make_model(0.3), {"policy": ada.NormTest(eta=0.7), "measure": FULL, "global_batch_size": 30}),
    "a part": (
        lambda: make_model(0.3),
        {"policy": ada.NormTest(eta=0.7), "measure": ada.Measure(every=1, max_examples=9), "global_batch_size": 30},
    ),
    "batch norm": (
        with_batch_norm,
        {
            "policy": ada.NormTest(eta=0.7),
            "measure": ada.Measure(estimator=ada.MicroBatch(), every=1),
            "global_batch_size": 30,
        },
    ),
}


def build(kind: str, **options: Any) -> Any:
    make, more = KINDS[kind]
    model = make()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    return make_engine(model, optimizer, total_samples=500, micro_batch_size=8, **more, **options)


def run(engine: Any, at: int, failing: int | None, error: Exception, smaller: int | None = None) -> list[Any]:
    """Train; in step `at` a micro-batch runs out of memory once, or the micro-batches are smaller from there on."""
    seen, trace = [0], []
    loss = mean_loss(engine.model)
    for step in engine:
        if engine.steps == at and smaller is not None:
            engine.micro_batch_size = smaller
            step.begin(*plan(engine))
        done, failed = [0], [False]

        def one(batch: Any, step: Any = step, done: Any = done, failed: Any = failed) -> torch.Tensor:
            value = loss(batch)  # the forward has drawn, and has moved running statistics
            if step.number == at + 1 and done[0] == failing and not failed[0]:
                failed[0] = True
                random.random()
                raise error
            done[0] += 1
            seen[0] += 1
            return value

        step.run(one)
        decision = step.update()
        trace.append((decision.plan.global_batch_size, decision.observation.loss, decision.requested, random.random()))
    return trace


def plan(engine: Any) -> Any:
    """What the engine itself does, for the run that has the smaller size from the start of the step."""
    retries = engine.memory_retries
    with pytest.warns(UserWarning, match="memory ran out"):
        found = plan_again(engine, engine.micro_batch_size)
    engine.memory_retries = retries
    return found


@pytest.mark.filterwarnings("ignore:memory ran out")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_the_repeated_step_is_that_of_smaller_micro_batches(kind: str, failing: int) -> None:
    at = 3 if kind != "schedule" else next(k for k, size in enumerate(sizes_of(kind)) if k > 2 and size > 24)
    random.seed(4)
    expected_engine = build(kind)
    expected = run(expected_engine, at, None, MemoryError(), smaller=4)
    random.seed(4)
    engine = build(kind)
    with pytest.warns(UserWarning, match=r"memory ran out in step \d+, which is repeated with micro_batch_size=4"):
        found = run(engine, at, failing, ERRORS["accelerator"])
    assert engine.memory_retries == 1
    assert engine.micro_batch_size == 4
    assert found == expected
    assert torch.equal(weights(engine.model), weights(expected_engine.model))
    for left, right in zip(engine.model.buffers(), expected_engine.model.buffers(), strict=True):
        assert torch.equal(left, right)


def sizes_of(kind: str) -> list[int]:
    return [decision.plan.global_batch_size for decision in train(build(kind))]


@pytest.mark.parametrize("name", ERRORS)
def test_every_way_of_running_out_of_memory_is_one(name: str, tmp_path: Path) -> None:
    engine = build("norm test", log_dir=tmp_path)
    with pytest.warns(UserWarning, match="memory ran out"):
        run(engine, 1, 1, ERRORS[name])
    assert engine.memory_retries == 1
    assert json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])["memory_retries"] == 1


def test_other_errors_pass() -> None:
    engine = build("norm test")
    with pytest.raises(RuntimeError, match="shape"):
        run(engine, 1, 1, RuntimeError("shape"))
    assert engine.memory_retries == 0


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_it_halves_until_it_fits_and_gives_up_at_one_example() -> None:
    engine = build("schedule")
    loss = mean_loss(engine.model)

    def fits(most: int) -> Any:
        def one(batch: Any) -> torch.Tensor:
            if len(batch[0]) > most:
                raise torch.OutOfMemoryError
            return loss(batch)

        return one

    train(engine, fits(2), steps=5)
    assert engine.micro_batch_size == 2
    with pytest.raises(OutOfMemory, match="one example needs more memory"):
        train(engine, fits(0))


def test_what_the_failed_micro_batch_held_is_free_before_the_step_is_repeated() -> None:
    engine = build("norm test")
    loss, held, alive = mean_loss(engine.model), [], []
    gc.disable()
    try:
        for step in engine:

            def one(batch: Any) -> torch.Tensor:
                alive.extend(reference() is not None for reference in held)
                value = loss(batch)
                if not held:
                    held.append(weakref.ref(value))
                    raise torch.OutOfMemoryError
                return value

            with pytest.warns(UserWarning, match="memory ran out"):
                step.run(one)
            step.update()
            break
    finally:
        gc.enable()
    assert alive
    assert not any(alive)


def test_a_buffer_that_changes_for_the_first_time_cannot_be_put_back() -> None:
    model = make_model()
    model.register_buffer("calls", torch.zeros(1 << 17))
    engine = make_engine(model, policy=Sizes(), data=make_data())
    train(engine, steps=3)
    loop = iter(engine)
    step = next(loop)

    def one(batch: Any) -> torch.Tensor:
        model.calls += 1
        raise torch.OutOfMemoryError

    with pytest.raises(OutOfMemory, match="a buffer that had never changed before"):
        step.run(one)
    loop.close()
