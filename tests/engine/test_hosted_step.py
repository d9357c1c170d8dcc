"""A step in smaller parts, for a trainer that has the loop, the backward and the optimizer's step to itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from adadagrad import AdaptiveBatch, Bounds, ConstantBatch, Measure, NormTest
from adadagrad.core.errors import InvalidArgument, NonFiniteGradient, StepError
from adadagrad.engine.loop import next_step
from adadagrad.parallel import SingleProcess
from adadagrad.statistics import MicroBatch, PerExample

N, MICRO = 100, 8


def make(seed=0, policy=None, *, whole=0, optimizer=torch.optim.Adagrad, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = TensorDataset(
        torch.randn(N, 5, generator=torch.Generator().manual_seed(1)).double(),
        torch.randn(N, 1, generator=torch.Generator().manual_seed(2)).double(),
    )
    parallel = SingleProcess(model)
    parallel.whole = whole
    settings = {"micro_batch_size": MICRO, "global_batch_size": 16, "epochs": 2, **settings}
    policy = NormTest(eta=0.6) if policy is None else policy
    return AdaptiveBatch(model, optimizer(model.parameters(), lr=0.05), data, policy, parallel=parallel, **settings)


def loss_of(engine, batch):
    return (engine.model(batch[0]) - batch[1]).square().mean()


def hosted(engine, steps=10**9, clip=None, seen=None):
    """What a trainer does: its own backward, clipping and optimizer step."""
    decisions = []
    for step in engine:
        while step.left:
            batch = step.open()
            if seen is not None:
                seen.append(len(batch[0]))
            step.share(loss_of(engine, batch)).backward()
            step.close()
        step.prepare()
        if clip is not None:
            nn.utils.clip_grad_norm_(engine.model.parameters(), clip)
        engine.optimizer.step()
        decisions.append(step.complete())
        if len(decisions) == steps:
            break
    return decisions


def plain(engine):
    decisions = []
    for step in engine:
        step.run(lambda batch: loss_of(engine, batch))
        decisions.append(step.update())
    return decisions


def trace(decisions):
    return [d.plan.global_batch_size for d in decisions]


def test_a_hosted_run_is_the_engines_own_bit_for_bit():
    ours, theirs = make(), make()
    assert trace(hosted(ours)) == trace(plain(theirs))
    assert len(set(trace(plain(make())))) > 1
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_host_clips_after_the_statistics():
    clipped, free = hosted(make(), 1, clip=1e-3)[0], hosted(make(), 1)[0]
    assert clipped.observation.gradient == free.observation.gradient
    ours, theirs = make(), make(max_grad_norm=1e-2)
    hosted(ours, clip=1e-2)
    plain(theirs)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=0)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("estimator", [PerExample(), MicroBatch()])
@pytest.mark.parametrize("most", [None, 12])
def test_whole_micro_batches_are_never_split(estimator, most):
    settings = {"bounds": Bounds(multiple_of=MICRO), "epoch_boundary": "short"}
    measure = Measure(every=1, estimator=estimator, max_examples=most)
    seen = []
    decisions = hosted(make(whole=MICRO, measure=measure, **settings), seen=seen)
    assert seen == ([MICRO] * (N // MICRO) + [N % MICRO]) * 2
    assert len(set(trace(decisions))) > 1
    split = []
    hosted(make(measure=Measure(every=1, estimator=MicroBatch()), **settings), seen=split)
    assert split != seen  # which the engine does where nobody counts


def test_whole_units_need_two_micro_batches():
    settings = {"bounds": Bounds(multiple_of=MICRO), "epoch_boundary": "short", "whole": MICRO}
    with pytest.raises(InvalidArgument, match="global_batch_size must be >= 16"):
        make(global_batch_size=8, measure=Measure(every=1, estimator=MicroBatch()), **settings)


def test_a_gradient_that_is_not_finite_is_gone_before_the_host_steps():
    engine = make(policy=ConstantBatch())
    before = copy.deepcopy(engine.model.state_dict())
    steps = iter(engine)
    step = next(steps)
    while step.left:
        batch = step.open()
        step.share(loss_of(engine, batch) * math.inf).backward()
        step.close()
    assert not step.prepare().finite
    engine.optimizer.step()
    assert step.complete().reason == "skipped: non-finite"
    assert engine.samples_seen == 0
    assert engine.samples_drawn == 16
    assert all(torch.equal(before[name], value) for name, value in engine.model.state_dict().items())


def test_stop_stops_before_the_optimizer_has_a_gradient():
    engine = make(policy=ConstantBatch(), on_nonfinite="stop")
    steps = iter(engine)
    step = next(steps)
    while step.left:
        step.share(loss_of(engine, step.open()) * math.nan).backward()
        step.close()
    step.prepare()
    assert all(p.grad is None for p in engine.model.parameters())
    with pytest.raises(NonFiniteGradient, match="not both finite"):
        step.complete()


def test_parts_in_the_wrong_order_are_refused():
    engine = make()
    step = next_step(engine)
    with pytest.raises(StepError, match="no micro-batch is open"):
        step.close()
    with pytest.raises(StepError, match="no micro-batch is waiting"):
        step.share(torch.ones((), requires_grad=True))
    with pytest.raises(StepError, match="2 of 2 micro-batches are left"):
        step.prepare()
    with pytest.raises(StepError, match="complete comes once"):
        step.complete()
    batch = step.open()
    with pytest.raises(StepError, match="close the latest one"):
        step.open()
    step.share(loss_of(engine, batch)).backward()
    with pytest.raises(StepError, match="no micro-batch is waiting"):
        step.share(loss_of(engine, batch))
    step.close()
    step.open()
    with pytest.raises(StepError, match="had no backward"):
        step.close()


def test_after_prepare_only_complete_is_left():
    engine = make()
    step = next_step(engine)
    while step.left:
        step.share(loss_of(engine, step.open())).backward()
        step.close()
    with pytest.raises(StepError, match="no micro-batch can be opened"):
        step.open()
    step.prepare()
    for again in (step.prepare, step.update):
        with pytest.raises(StepError, match="called twice"):
            again()
    engine.optimizer.step()
    step.complete()
    with pytest.raises(StepError, match="complete comes once"):
        step.complete()


def test_what_replays_is_left_to_the_engine():
    engine = make(replay=True, optimizer=torch.optim.SGD)
    step = next_step(engine)
    while step.left:
        step.share(loss_of(engine, step.open())).backward()
        step.close()
    with pytest.raises(StepError, match=r"use step.update\(\)"):
        step.prepare()


def test_an_opened_step_that_is_left_comes_again():
    ours, theirs = make(), make()
    for step in ours:
        step.open()
        break
    assert trace(hosted(ours)) == trace(hosted(theirs))
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_progress_resumes_where_the_host_keeps_model_and_optimizer():
    whole, first, second = make(), make(), make(seed=5)
    expected = hosted(whole)
    begun = hosted(first, 3)
    state = first.progress_state()
    assert not {"model", "optimizer"} & set(state)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_progress_state(state)
    assert trace(begun) + trace(hosted(second)) == trace(expected)
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_progress_is_not_taken_or_given_in_the_middle_of_a_step():
    engine = make()
    state = engine.progress_state()
    for step in engine:
        step.open()
        with pytest.raises(StepError, match="a step is in progress"):
            engine.progress_state()
        with pytest.raises(StepError, match="a step is in progress"):
            engine.load_progress_state(state)
        break
    del state["stream"]
    with pytest.raises(InvalidArgument, match="state lacks stream"):
        engine.load_progress_state(state)
