"""What goes wrong on one rank is known to all of them: a wish to stop, numbers that are not finite."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.core.errors import NonFiniteGradient, OutOfMemory
from adadagrad.engine.planning import plan_again
from tests.engine.cases import Sizes, make_data, make_engine, make_model, mean_loss, train, weights
from tests.engine.test_out_of_memory import with_batch_norm
from tests.ranks import on_ranks


def build(policy: Any = None, model: Any = None, **options: Any) -> Any:
    model = make_model(0.3) if model is None else model
    return make_engine(
        DistributedDataParallel(model),
        torch.optim.SGD(model.parameters(), lr=0.05),
        policy=Sizes() if policy is None else policy,
        min_batch_size=4,
        total_samples=400,
        **options,
    )


def one_is_told(rank: int, victim: int, folder: str) -> Any:
    engine = build(log_dir=folder, checkpoint_every=10**9)
    try:
        for step in engine:
            if engine.steps == 3 and rank == victim:
                os.kill(os.getpid(), signal.SIGTERM)
            step.run(mean_loss(engine.model))
            step.update()
    except SystemExit as left:
        code = left.code
    again = build(log_dir=folder, checkpoint_every=10**9)
    return code, engine.steps, again.resume(), again.steps


@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (2, 1), (4, 3)])
def test_all_ranks_leave_after_the_same_step(ranks: int, victim: int, tmp_path: Path) -> None:
    assert on_ranks(ranks, one_is_told, victim, str(tmp_path)) == [(143, 4, True, 4)] * ranks


def one_is_not_finite(rank: int, kind: str) -> Any:
    """Rank 1 has a loss or gradient that is not finite in steps 2 and 4."""
    measure = ada.Measure(every=1, max_examples=None)
    engine = build(ada.NormTest(eta=0.8), measure=measure, data=make_data(), global_batch_size=8)
    before, reasons, held = [], [], []
    for step in engine:
        before.append(weights(engine.parallel.module))
        bad = rank == 1 and step.number in (2, 4)

        def loss(batch: Any, bad: bool = bad) -> torch.Tensor:
            value = mean_loss(engine.model)(batch)
            if bad and kind == "gradient":
                return value + (value * 0).sqrt()  # 0 has an infinite slope
            return value * (float("nan") if bad else 1.0)

        step.run(loss)
        decision = step.update()
        reasons.append(decision.reason)
        held.append(decision.next_plan.global_batch_size == decision.plan.global_batch_size)
        if step.number == 5:
            break
    unchanged = [torch.equal(before[k], before[k + 1]) for k in range(4)]
    return (
        reasons,
        unchanged,
        held,
        engine.skipped,
        engine.samples_seen,
        engine.samples_drawn,
        weights(engine.parallel.module),
    )


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(kind: str) -> None:
    found = on_ranks(2, one_is_not_finite, kind)
    for reasons, unchanged, held, skipped, seen, drawn, _ in found:
        assert [reason == "skipped: non-finite" for reason in reasons] == [False, True, False, True, False]
        assert unchanged == [False, True, False, True]
        assert held[1]
        assert held[3]
        assert not all(held)
        assert skipped == 2
        assert seen < drawn
    assert torch.equal(found[0][-1], found[1][-1])
    assert found[0][:6] == found[1][:6]


def one_stops(rank: int) -> str:
    engine = build(on_nonfinite="stop")
    with pytest.raises(NonFiniteGradient) as error:
        train(engine, lambda batch: mean_loss(engine.model)(batch) * (float("inf") if rank == 2 else 1.0))
    return str(error.value)[:40]


def test_or_all_ranks_stop() -> None:
    found = on_ranks(4, one_stops)
    assert found == [found[0]] * 4


def one_is_short(rank: int, who: int | None, failing: int, smaller: int | None, normalised: bool) -> Any:
    """Rank `who` (-1: all) runs out of memory in a micro-batch of step 3, or micro-batches are smaller from there."""
    engine = build(ada.ConstantBatch(40), with_batch_norm() if normalised else None, micro_batch_size=4)
    loss, failed = mean_loss(engine.model), []
    for step in engine:
        if smaller is not None and step.number == 3:
            step.begin(*plan_again(engine, smaller))
        done = [0]

        def one(batch: Any, step: Any = step, done: list[int] = done) -> torch.Tensor:
            value = loss(batch)
            if step.number == 3 and who in (rank, -1) and done[0] == failing and not failed:
                failed.append(1)
                raise torch.OutOfMemoryError
            done[0] += 1
            return value

        step.run(one)
        step.update()
    model = engine.parallel.module
    whole = torch.cat([weights(model), *(buffer.detach().double().flatten() for buffer in model.buffers())])
    return engine.memory_retries, engine.micro_batch_size, engine.steps, whole


def every_place(rank: int, normalised: bool) -> Any:
    warnings.simplefilter("ignore")
    expected = one_is_short(rank, None, 0, 2, normalised)
    places = [(who, failing) for who in (0, 1, -1) for failing in range(4)]
    found = {place: one_is_short(rank, *place, None, normalised) for place in places}
    same = {
        place: (*result[:3], torch.equal(result[3], expected[3])) == (*expected[:3], True)
        for place, result in found.items()
    }
    return expected[:3], same


def every_place_of_both(rank: int) -> Any:
    return [every_place(rank, normalised) for normalised in (False, True)]


def test_memory_that_runs_out_on_one_rank_or_all_before_they_synchronise() -> None:
    for found in on_ranks(2, every_place_of_both):
        for expected, same in found:
            assert expected == (1, 2, 10)
            assert all(same.values()), same


def too_late(rank: int) -> str:
    """Rank 1 runs out of memory in its last micro-batch, where rank 0 waits for it."""
    engine = build(ada.ConstantBatch(40), micro_batch_size=4)
    loss, done = mean_loss(engine.model), [0]

    def one(batch: Any) -> torch.Tensor:
        done[0] += 1
        if rank == 1 and done[0] == 5:
            raise torch.OutOfMemoryError
        return loss(batch)

    try:
        train(engine, one, steps=1)
    except OutOfMemory as error:
        dist.destroy_process_group()  # as leaving the process does
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return str(error)
    except RuntimeError as error:
        return f"lost: {type(error).__name__}"
    return "trained"


def test_afterwards_it_is_an_error_that_names_the_size_and_nobody_waits_for_ever() -> None:
    waiting, short = on_ranks(2, too_late)
    assert "resume from the last checkpoint with micro_batch_size=2" in short
    assert waiting.startswith("lost: ")
