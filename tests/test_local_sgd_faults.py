"""`LocalSGD` when something goes wrong on a rank, or the run is ended and goes on: nobody waits, nothing is lost."""

from __future__ import annotations

import copy
import math
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.core.errors import NonFiniteGradient, RanksDisagree, StepError
from tests.engine.cases import make_data, make_engine, make_model, mean_loss, read_log, train, weights
from tests.ranks import on_ranks
from tests.test_local_sgd import OPTIMIZERS, local, together


def poisoned(rank: int, on_nonfinite: str) -> Any:
    engine = local(2, policy=ada.ConstantBatch(12), total_samples=96, on_nonfinite=on_nonfinite)

    def loss(batch: Any) -> Any:
        bad = rank == 1 and engine.steps in (2, 3, 4)
        return mean_loss(engine.model)(batch) * (math.nan if bad else 1.0)

    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteGradient, match="2 local updates before step 4"):
            train(engine, loss)
        return engine.steps
    decisions = train(engine, loss)
    return [d.samples_seen for d in decisions], engine.skipped, engine.samples_drawn, weights(engine.model)


def test_a_rank_that_is_not_finite() -> None:
    (seen, skipped, drawn, w), other = on_ranks(2, poisoned, "skip")
    assert seen == [12, 24, 36, 36, 48, 54, 66, 78, 90, 96]  # rank 1's 6 of a step, taken off where the ranks meet
    assert (skipped, drawn) == (3, 96 + 3 * 6)
    assert bool(w.isfinite().all())
    assert torch.equal(w, other[3])
    assert on_ranks(2, poisoned, "stop") == [3, 3]


def saved(rank: int, folder: str, state: str) -> Any:
    def build(log: str | None = None) -> Any:
        return local(
            3,
            OPTIMIZERS["adam"],
            ada.NormTest(eta=0.4),
            make_model_with_dropout(),
            _optimizer_state=state,
            total_samples=600,
            log_dir=log,
        )

    whole, found = build(), []
    for step in whole:
        step.run(mean_loss(whole.model))
        step.update()
        if whole.steps == 4:
            with pytest.raises(StepError, match="middle of a round"):
                whole.save(f"{folder}/no.pt")
        if whole.steps in (3, 6):
            whole.save(f"{folder}/{whole.steps}.pt")
    for k in (3, 6):
        again = build()
        again.load(f"{folder}/{k}.pt")
        assert again.parallel.rounds == k // 3
        train(again)
        found.append(torch.equal(weights(again.model), weights(whole.model)) and again.steps == whole.steps)
    return found


def make_model_with_dropout() -> nn.Module:
    return make_model(0.3)


@pytest.mark.parametrize("state", ["average", "local"])
def test_resuming_from_a_meeting_bit_for_bit(state: str, tmp_path: Path) -> None:
    assert on_ranks(2, saved, str(tmp_path), state) == [[True, True], [True, True]]


def unlike(rank: int) -> str:
    """One rank's optimizer has a momentum that the other's has not: there is no mean, and nobody waits."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parallel = ada.LocalSGD(model, optimizer, 1)
    if rank == 0:
        mean_loss(model)([t[:4] for t in make_data().tensors]).backward()
        optimizer.step()
    parallel.begin_step(1, 0)
    with pytest.raises(RanksDisagree, match='optimizer_state="local"'):
        parallel.after_update(4, 4.0)
    return "refused"


def test_optimizers_that_have_no_mean() -> None:
    assert on_ranks(2, unlike) == ["refused", "refused"]


def saves_by_itself(rank: int, folder: str) -> Any:
    """Saved and stopped where the ranks meet, though both fall due in the middle of a round; then resumed."""

    def build(name: str) -> Any:
        options = {"log_dir": f"{folder}/{name}", "checkpoint_every": 30, "total_samples": 240}
        return local(3, OPTIMIZERS["momentum"], model=make_model(0.3), **options)

    whole = build("whole")
    train(whole)
    told, status = build("told"), None
    try:
        for step in told:
            if told.steps == 6 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            step.run(mean_loss(told.model))
            step.update()
    except SystemExit as left:
        status = left.code
    again = build("told")
    resumed = again.resume()
    stopped_at = again.steps
    train(again)
    saved = sorted(path.name for path in Path(f"{folder}/whole/checkpoints").iterdir())
    return status, resumed, stopped_at, torch.equal(weights(again.model), weights(whole.model)), saved


def test_saving_and_stopping_wait_for_a_meeting(tmp_path: Path) -> None:
    names = [f"step-{step:09d}.pt" for step in (12, 15, 18)]
    assert on_ranks(2, saves_by_itself, str(tmp_path)) == [(143, True, 9, True, names)] * 2
    assert read_log(tmp_path / "told") == read_log(tmp_path / "whole")


def short_of_memory(rank: int) -> Any:
    """Rank 1 runs out of memory where the ranks meet, and repeats its step alone; rank 0 waits for nothing more."""
    engines = [
        local(2, policy=ada.NormTest(eta=0.5), global_batch_size=16, max_batch_size=64, total_samples=600)
        for _ in range(2)
    ]
    failed: list[int] = []

    def loss(batch: Any) -> Any:
        if rank == 1 and engines[0].steps in (1, 3, 4) and engines[0].steps not in failed:
            failed.append(engines[0].steps)
            raise torch.OutOfMemoryError
        return mean_loss(engines[0].model)(batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sizes = [[d.plan.global_batch_size for d in train(engines[0], loss)]]
    sizes.append([d.plan.global_batch_size for d in train(engines[1])])
    apart = float((weights(engines[0].model) - weights(engines[1].model)).abs().max())
    return sizes[0] == sizes[1], apart < 1e-12, engines[0].memory_retries, len(set(sizes[0])) > 1


def test_memory_that_runs_out_on_one_rank() -> None:
    assert on_ranks(2, short_of_memory) == [(True, True, 0, True), (True, True, 3, True)]


def broken(rank: int) -> Any:
    """An error in the middle of a round, after which the run goes back to a checkpoint."""
    engine = local(3, total_samples=120)
    state = copy.deepcopy(engine.state_dict())

    def loss(batch: Any) -> Any:
        return mean_loss(engine.model)(batch) if engine.steps != 4 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        train(engine, loss)
    assert not engine.parallel.together
    engine.load_state_dict(state)
    train(engine)
    whole = local(3, total_samples=120)
    train(whole)
    return torch.equal(weights(engine.model), weights(whole.model)), engine.parallel.rounds


def test_going_back_from_the_middle_of_a_round() -> None:
    assert on_ranks(2, broken) == [(True, 4), (True, 4)]


def lost_at_the_end(rank: int) -> Any:
    def loss(batch: Any) -> Any:
        return mean_loss(engine.model)(batch) * (math.nan if rank == 0 and engine.steps == 5 else 1)

    engine = local(4, total_samples=72, on_nonfinite="stop")
    with pytest.raises(NonFiniteGradient, match="1 local updates before the end"):
        train(engine, loss)
    engine = local(4, total_samples=72)
    train(engine, loss)
    return engine.samples_seen, engine.samples_drawn, engine.skipped, weights(engine.model)


def test_what_is_left_out_in_a_round_that_the_end_cuts_short() -> None:
    (*counts, w), (*others, other) = on_ranks(2, lost_at_the_end)
    assert counts == others == [66, 72, 1]
    assert torch.equal(w, other)


def weightless_part(rank: int) -> Any:
    """A measured micro-batch of rank 1 weighs nothing: no rank has statistics, and none waits for a vector."""
    engine = local(
        2,
        policy=ada.NormTest(eta=0.5),
        measure=ada.Measure(estimator=ada.MicroBatch(units=2), every=1),
        global_batch_size=16,
        micro_batch_size=4,
        total_samples=96,
    )
    calls: list[int] = []

    def loss(batch: Any) -> Any:
        calls.append(len(calls))
        weight = torch.full((len(batch[0]),), float(rank == 0 or len(calls) % 2), dtype=torch.float64)
        return (F.cross_entropy(engine.model(batch[0]), batch[1], reduction="none") * weight).sum(), weight

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        decisions = train(engine, loss)
    return [d.reason for d in decisions], together(engine.model)


def test_a_measurement_that_fails_on_one_rank() -> None:
    for reasons, apart in on_ranks(2, weightless_part):
        assert reasons == 3 * ["local step", "measurement failed"]
        assert apart == 0.0


def weightless_rank(rank: int) -> Any:
    """All examples of rank 1 weigh nothing in some steps, as those of a batch of padding do."""
    models = [make_model(), make_model()]
    engines = [
        local(1, OPTIMIZERS["momentum"], model=models[0], total_samples=96),
        make_engine(
            DistributedDataParallel(models[1]),
            OPTIMIZERS["momentum"](models[1].parameters()),
            policy=ada.ConstantBatch(12),
            seed=3,
            total_samples=96,
        ),
    ]
    losses = []
    for engine in engines:

        def loss(batch: Any, engine: Any = engine) -> Any:
            weight = batch[3] * float(rank == 0 or engine.steps % 3 != 1)
            return (F.cross_entropy(engine.model(batch[0]), batch[1], reduction="none") * weight).sum(), weight

        losses.append([d.observation.loss for d in train(engine, loss)])
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return len(losses[0]), apart, engines[0].samples_seen, float((weights(models[0]) - weights(models[1])).abs().max())


def test_a_rank_whose_examples_weigh_nothing() -> None:
    for steps, losses, seen, apart in on_ranks(2, weightless_rank):
        assert (steps, seen) == (8, 96)
        assert losses < 1e-12
        assert apart < 0.02  # a rank without an example leaves its momentum alone


def nothing_finite(rank: int) -> Any:
    """No rank has a finite loss where the second round ends: the loss that `CABS` averages is that of other steps."""
    measure = ada.Measure(estimator=ada.Worker(), every=1)
    engine = local(2, policy=ada.CABS(), global_batch_size=12, total_samples=120, measure=measure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return train(engine, lambda batch: mean_loss(engine.model)(batch) * (math.nan if engine.steps == 3 else 1))


def test_a_meeting_without_a_finite_loss_is_forgotten() -> None:
    for decisions in on_ranks(2, nothing_finite):
        averages = [d.observation.loss_average for d in decisions[1::2]]
        assert averages[1] == averages[0]
        assert all(math.isfinite(average) for average in averages)
        assert not any(d.reason.startswith("nan") for d in decisions)


def test_local_steps_go_on_from_a_run_without_them(tmp_path: Path) -> None:
    model = make_model()
    first = make_engine(model, OPTIMIZERS["sgd"](model.parameters()), policy=ada.ConstantBatch(12), seed=3)
    first.save(tmp_path / "plain.pt")
    second = local(4)
    second.load(tmp_path / "plain.pt")
    assert second.parallel.rounds == 0


def late(rank: int, name: str) -> Any:
    """Rank 1 has made no update when the ranks first meet, and its optimizer remembers nothing yet."""
    engine = local(2, OPTIMIZERS[name], total_samples=120)
    first = (0, 1) if rank == 1 else ()
    train(engine, lambda batch: mean_loss(engine.model)(batch) * (math.nan if engine.steps in first else 1.0))
    state = [v for own in engine.optimizer.state.values() for k, v in sorted(own.items()) if k != "step"]
    return engine.skipped, weights(engine.model), state


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_rank_whose_first_updates_are_left_out(name: str) -> None:
    (skipped, w, state), (_, other, others) = on_ranks(2, late, name)
    assert skipped == 2
    assert torch.equal(w, other)
    assert len(state) == len(others) > 0
    assert all(torch.equal(a, b) for a, b in zip(state, others, strict=True))
