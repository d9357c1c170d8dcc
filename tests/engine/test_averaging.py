"""Policies that want statistics of several steps are given them, and nothing of that is lost or done twice."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
import torch

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.policies.base import AbstractPolicy
from adadagrad.statistics.running import RunningStatistics
from tests.engine.cases import (
    Failing,
    Recording,
    losses_of,
    make_data,
    make_engine,
    make_model,
    mean_loss,
    put,
    read_log,
    train,
)
from tests.oracles import example_gradients

EVERY = ada.Measure(every=1, max_examples=None)


@dataclass(frozen=True, slots=True)
class Remembering(AbstractPolicy):
    """Asks for what a function makes of an observation whose statistics were combined."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})
    monotone: ClassVar[bool] = False
    averaging: float | Literal["epoch"] | None = 0.9
    answer: Callable[[Observation], float] = field(default=lambda o: 10.0, compare=False)

    def required_batch_size(self, observation: Observation) -> float:
        assert observation.gradient is not None
        return self.answer(observation)


def own_statistics(lines: list[dict[str, Any]]) -> list[GradientStatistics]:
    return [
        GradientStatistics(
            num_examples=line["global_batch_size"],
            grad_norm_sq=line["step_grad_norm_sq"],
            variance_trace=line["step_variance_trace"],
        )
        for line in lines
    ]


def test_a_policy_reads_the_average_and_the_log_holds_both(tmp_path: Any) -> None:
    seen: list[Observation] = []

    def answer(observation: Observation) -> float:
        if not seen or seen[-1].samples_seen != observation.samples_seen:
            seen.append(observation)
        return 7.0 + observation.samples_seen % 5

    policy = Remembering(answer=answer)
    engine = make_engine(make_model(), policy=policy, measure=EVERY, total_samples=200, log_dir=tmp_path)
    decisions = train(engine)
    start, *lines = [line for line in read_log(tmp_path) if line["kind"] in ("start", "step")]
    assert start["averaging"] == 0.9
    whole = [line for line in lines if "step_grad_norm_sq" in line]
    assert len(whole) >= len(decisions) - 1
    running, total, weight = RunningStatistics(0.9), 0.0, 0.0
    for line, decision, own, looked in zip(whole, decisions, own_statistics(whole), seen, strict=False):
        expected = running.update(own, ())
        gradient = decision.observation.gradient
        assert gradient is not None
        assert gradient.variance_trace == pytest.approx(expected.variance_trace, rel=1e-12)
        assert gradient.grad_norm_sq == pytest.approx(expected.grad_norm_sq, rel=1e-12)
        assert line["variance_trace"] == gradient.variance_trace
        total, weight = 0.9 * total + 0.1 * line["loss"], 0.9 * weight + 0.1
        assert looked.loss_average == line["loss_average"] == pytest.approx(total / weight, rel=1e-12)
    assert whole[5]["step_variance_trace"] != whole[5]["variance_trace"]


def test_a_policy_that_asks_for_nothing_is_given_no_average(tmp_path: Any) -> None:
    decisions = train(make_engine(make_model(), measure=EVERY, log_dir=tmp_path))
    assert {d.observation.loss_average for d in decisions} == {None}
    assert not any("step_variance_trace" in line for line in read_log(tmp_path))


def test_an_epoch_is_asked_about_once_and_is_the_sum_over_its_examples() -> None:
    """Against every example's gradient at the parameters of its own step, added up one by one."""
    data, model = make_data(60), make_model()
    optimizer = Recording(model.parameters())
    policy = Remembering(averaging="epoch")
    engine = make_engine(model, optimizer, data, policy=policy, measure=EVERY, global_batch_size=10, total_samples=180)
    decisions, rows = [], []
    for step in engine:
        seen = []
        for batch in step:
            seen.append(batch[2])
            step.backward(mean_loss(model)(batch))
        rows.append(torch.cat(seen))
        decisions.append(step.update())
    asked = [d for d in decisions if d.observation.gradient is not None]
    assert [d.samples_seen for d in asked] == [60, 120, 180]
    assert {d.reason for d in decisions if d.observation.gradient is None} == {"within the epoch"}
    for number, decision in enumerate(asked):
        gradients = []
        for k in range(6 * number, 6 * number + 6):
            other = put(make_model(), optimizer.before[k])
            gradients.append(example_gradients(other, losses_of(data, rows[k])))
        units = torch.cat(gradients)
        found, mean = decision.observation.gradient, units.mean(0)
        assert found is not None
        assert found.num_examples == 60
        assert found.grad_norm_sq == pytest.approx(float(mean @ mean), rel=1e-9)
        assert found.variance_trace == pytest.approx(float(units.var(0).sum()), rel=1e-9)


@pytest.mark.parametrize("averaging", [0.9, "epoch"])
@pytest.mark.parametrize("at", [3, 14])
def test_resuming_in_the_middle_is_exact(averaging: Any, at: int, tmp_path: Any) -> None:
    def make() -> Any:
        def answer(observation: Observation) -> float:
            g = observation.gradient
            assert g is not None
            return 8.0 + 1e6 * g.variance_trace % 9

        policy = Remembering(averaging=averaging, answer=answer)
        return make_engine(make_model(), data=make_data(40), policy=policy, measure=ada.Measure(every=2))

    whole = make()
    expected = train(whole)
    first = make()
    train(first, steps=at)
    first.save(tmp_path / "state.pt")
    second = make()
    second.load(tmp_path / "state.pt")
    rest = train(second)
    assert [(d.requested, d.plan, d.observation) for d in rest] == [
        (d.requested, d.plan, d.observation) for d in expected[at:]
    ]
    assert any(d.requested is not None for d in rest)


@pytest.mark.parametrize("averaging", [0.9, "epoch"])
def test_a_step_that_is_given_up_leaves_no_trace(averaging: Any) -> None:
    model = make_model()
    optimizer = Failing(model.parameters())
    engine = make_engine(model, optimizer, policy=Remembering(averaging=averaging), measure=EVERY)
    train(engine, steps=4)
    before = copy.deepcopy(engine.measuring.averaging.state_dict())
    for step in engine:
        step.run(mean_loss(model))
        break
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="no"):
        train(engine, steps=1)
    after = engine.measuring.averaging.state_dict()
    assert repr(after) == repr(before)


def test_an_average_around_the_estimator_watches_a_constant_batch(tmp_path: Any) -> None:
    measure = ada.Measure(every=1, max_examples=None, estimator=ada.ExponentialAverage(decay=0.8))
    engine = make_engine(make_model(), policy=ada.ConstantBatch(20), measure=measure, log_dir=tmp_path)
    decisions = train(engine)
    lines = [line for line in read_log(tmp_path) if line["kind"] == "step"]
    assert {d.plan.global_batch_size for d in decisions} == {20}
    running = RunningStatistics(0.8)
    for line, own in zip(lines, own_statistics(lines), strict=True):
        expected = running.update(own, ()).noise_scale
        found = math.inf if line["noise_scale"] == "inf" else line["noise_scale"]
        assert found == pytest.approx(expected, rel=1e-9)


def test_parameters_may_be_frozen_and_freed_within_an_epoch() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = make_engine(model, optimizer, policy=Remembering(averaging="epoch"), measure=EVERY)
    first = next(model.parameters())
    for step in engine:
        step.run(mean_loss(model))
        step.update()
        first.requires_grad_(step.number % 3 != 0)
    assert engine.progress == engine.total_samples


def test_the_users_average_takes_the_place_of_the_policys_and_cannot_be_nested() -> None:
    measure = ada.Measure(every=1, estimator=ada.ExponentialAverage(ada.PerExample(), decay=0.5))
    assert make_engine(make_model(), policy=Remembering(averaging=0.9), measure=measure).measuring.averaging.over == 0.5
    nested = ada.Measure(estimator=ada.ExponentialAverage(measure.estimator, decay=0.8))
    with pytest.raises(InvalidArgument, match="estimator must average once"):
        make_engine(make_model(), measure=nested)


def test_an_average_is_no_sum_over_an_epoch() -> None:
    measure = ada.Measure(estimator=ada.ExponentialAverage())
    with pytest.raises(InvalidArgument, match="reads the sums of an epoch, not an average"):
        make_engine(make_model(), policy=Remembering(averaging="epoch"), measure=measure)


def test_no_policy_shrinks_a_batch_below_the_users_smallest() -> None:
    policy = Remembering(answer=lambda o: 2.0)
    sizes = {d.next_plan.global_batch_size for d in train(make_engine(make_model(), policy=policy, measure=EVERY))}
    assert sizes == {2, 4} or sizes == {2}
    engine = make_engine(make_model(), policy=policy, measure=EVERY, global_batch_size=12, min_batch_size=9)
    assert {d.next_plan.global_batch_size for d in train(engine)} == {9}


@pytest.mark.parametrize(
    ("smallest", "message"),
    [
        (0, "min_batch_size must be >= 1, got 0"),
        (13, "min_batch_size must be <= global_batch_size, got min_batch_size=13 and global_batch_size=12"),
    ],
)
def test_an_impossible_smallest_batch_is_refused(smallest: int, message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        make_engine(make_model(), global_batch_size=12, min_batch_size=smallest)
    assert message in str(error.value)


@pytest.mark.parametrize("after", [None, 0.9, "epoch"])
@pytest.mark.parametrize("before", [None, 0.9, "epoch"])
def test_a_state_that_was_combined_in_another_way_is_gone_on_from_with_nothing(before: Any, after: Any) -> None:
    first = make_engine(make_model(), policy=Remembering(averaging=before), measure=EVERY)
    train(first, steps=3)
    second = make_engine(make_model(), policy=Remembering(averaging=after), measure=EVERY)
    new = copy.deepcopy(second.measuring.averaging.state_dict())
    train(second, steps=2)
    second.load_state_dict(first.state_dict())
    expected = first.measuring.averaging.state_dict() if before == after else new
    assert repr(second.measuring.averaging.state_dict()) == repr(expected)
    train(second, steps=2)
