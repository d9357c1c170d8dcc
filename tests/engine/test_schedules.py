"""Batch sizes and learning rates that follow samples, not steps."""

from __future__ import annotations

import math

import pytest
import torch

import adadagrad as ada
from tests.engine.cases import Asks, Recording, Sizes, make_data, make_engine, make_model, train


def test_staged_sizes_change_exactly_at_their_thresholds():
    policy = ada.StagedBatch("0:5 40:20 100:8 150:33")
    decisions = train(make_engine(make_model(), policy=policy, total_samples=500))
    seen = 0
    for d in decisions:
        assert d.plan.global_batch_size == (5 if seen < 40 else 20 if seen < 100 else 8 if seen < 150 else 33)
        seen += d.observation.global_batch_size
    sizes = [d.observation.global_batch_size for d in decisions]
    # 8 x 5 = 40; 3 x 20 = 100; 7 x 8 = 156; 33s; what is left
    assert sizes == [5] * 8 + [20] * 3 + [8] * 7 + [33] * 10 + [14]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (ada.ConstantBatch(), [64] * 7 + [52]),
        (ada.StagedBatch({0: 300}), None),
    ],
)
def test_a_schedules_first_size(policy, expected):
    if expected is None:
        with pytest.raises(
            ada.core.errors.InvalidArgument, match="starts at 300 examples, but data set and budget hold"
        ):
            make_engine(make_model(), policy=policy)
        return
    decisions = train(make_engine(make_model(), policy=policy, total_samples=500))
    assert [d.observation.global_batch_size for d in decisions] == expected


def test_a_schedule_stops_at_the_cap():
    policy = ada.StagedBatch("0:5 40:1000")
    decisions = train(make_engine(make_model(), policy=policy, max_batch_size=30, total_samples=160))
    assert [d.observation.global_batch_size for d in decisions] == [5] * 8 + [30] * 4
    assert decisions[7].reason == "cap"


def test_multiples_hold_for_every_whole_batch_and_the_cap_is_never_exceeded():
    options = {"bounds": ada.Bounds(multiple_of=8), "global_batch_size": 8, "max_batch_size": 45, "total_samples": 600}
    answers = iter([9.0, 100.0, 3.0, 17.0])
    policy = Asks(lambda o: next(answers, 25.0))
    decisions = train(make_engine(make_model(), policy=policy, measure=ada.Measure(every=1), **options))
    assert [d.plan.global_batch_size for d in decisions][:6] == [8, 16, 40, 8, 24, 32]
    assert all(d.plan.global_batch_size % 8 == 0 for d in decisions)


def test_growth_is_limited_step_by_step():
    options = {"bounds": ada.Bounds(max_growth=1.5), "measure": ada.Measure(every=1), "total_samples": 600}
    decisions = train(make_engine(make_model(), policy=Asks(lambda o: 1e9), **options))
    assert [d.plan.global_batch_size for d in decisions][:7] == [4, 6, 9, 14, 21, 32, 48]
    assert decisions[0].reason == "growth limit"


@pytest.mark.parametrize(
    ("estimator", "smallest"), [("auto", 2), (ada.PerExample(), 2), (ada.MicroBatch(units=2), 4), (None, 1)]
)
def test_a_batch_shrinks_no_further_than_it_can_be_measured(estimator, smallest):
    """A test at one example would never be measured again; a schedule measures nothing and may go there."""
    if estimator is None:
        options = {"policy": ada.StagedBatch("0:8 8:1")}
    else:
        options = {"policy": Asks(lambda o: 0.5), "global_batch_size": 8}
        options["measure"] = ada.Measure(estimator=estimator, every=1)
    decisions = train(make_engine(make_model(), total_samples=30, **options))
    assert [d.plan.global_batch_size for d in decisions][:3] == [8, smallest, smallest]


SCHEDULES = {
    "constant": (ada.ConstantSchedule(), lambda t: 1.0),
    "cosine": (
        ada.CosineSchedule(warmup_samples=100, floor=0.1),
        lambda t: t / 100 if t < 100 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - 100) / 500)),
    ),
    "linear": (
        ada.LinearSchedule(warmup_samples=100, floor=0.5),
        lambda t: t / 100 if t < 100 else 1 - 0.5 * (t - 100) / 500,
    ),
}


def rates(schedule, policy, seed=0, **options):
    """The learning rate of each step by the samples seen before it."""
    model = make_model()
    optimizer = Recording(model.parameters(), lr=0.3)
    engine = make_engine(model, optimizer, make_data(), policy, lr_schedule=schedule, total_samples=600, seed=seed)
    decisions = train(engine)
    before = [d.samples_seen - d.observation.global_batch_size for d in decisions]
    assert [d.lr for d in decisions] == [d.observation.lr for d in decisions] == optimizer.rates
    return dict(zip(before, optimizer.rates, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_is_the_formula_at_the_samples_seen(name):
    schedule, formula = SCHEDULES[name]
    for t, lr in rates(schedule, Sizes(largest=30)).items():
        assert lr == pytest.approx(0.3 * formula(t), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", [*SCHEDULES, "step"])
def test_the_rate_at_a_number_of_samples_is_the_same_for_any_trace(name):
    schedule = ada.StepSchedule({200: 0.5, 400: 0.1}) if name == "step" else SCHEDULES[name][0]
    reference = rates(schedule, ada.StagedBatch({0: 1}))
    assert len(reference) == 600
    for policy in (Sizes(seed=1), Sizes(seed=2, largest=9), ada.StagedBatch("0:7 100:64"), ada.NormTest(eta=0.6)):
        for t, lr in rates(schedule, policy, seed=4).items():
            assert lr == reference[t]


def test_each_group_keeps_its_own_initial_rate():
    model = make_model()
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    engine = make_engine(model, optimizer, lr_schedule=ada.LinearSchedule(), policy=Sizes(), total_samples=300)
    for step in engine:
        factor = 1 - engine.samples_seen / 300
        assert [g["lr"] for g in optimizer.param_groups] == [0.2 * factor, 0.02 * factor]
        step.run(lambda batch: model(batch[0]).square().mean())
        step.update()


def test_a_rate_that_is_a_tensor_stays_one():
    model = make_model()
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=False, foreach=False)
    engine = make_engine(model, optimizer, lr_schedule=ada.LinearSchedule(), policy=Sizes(), total_samples=100)
    for step in engine:
        assert float(rate) == pytest.approx(0.1 * (1 - engine.samples_seen / 100), rel=1e-12)
        step.run(lambda batch: model(batch[0]).square().mean())
        step.update()


def test_without_a_schedule_the_rate_is_left_to_its_owner():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen = []
    for step in make_engine(model, optimizer, policy=ada.StagedBatch({0: 20}), total_samples=80):
        step.run(lambda batch: model(batch[0]).square().mean())
        seen.append(step.update().lr)
        scheduler.step()
    assert seen == [0.1, 0.05, 0.025, 0.0125]
