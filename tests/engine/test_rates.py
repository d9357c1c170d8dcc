"""A learning-rate rule inside the engine: what it sees, what it sets, and that nothing of it is lost or done twice."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics
from adadagrad.core.step_scale import StepScale
from adadagrad.rates.base import AbstractRate
from tests.engine.cases import (
    Failing,
    Recording,
    Sizes,
    make_data,
    make_engine,
    make_model,
    mean_loss,
    read_log,
    train,
)


@dataclass(frozen=True, slots=True)
class Root(AbstractRate):
    """The square root of the scale."""

    base_batch_size: int | None = None

    def factor(self, state: Mapping[str, float], step: StepScale) -> float:
        return step.scale**0.5


@dataclass(frozen=True, slots=True)
class Counting(AbstractRate):
    """Remembers V of all measured steps and how many steps there were; a step makes half its examples of progress."""

    needs: ClassVar[frozenset[str]] = frozenset({"variance_trace"})
    base_batch_size: int | None = None
    share: float = 0.5
    seen: list[Any] = dataclasses.field(default_factory=list, compare=False, repr=False)

    @property
    def counts_progress(self) -> bool:
        return True

    def start(self) -> Mapping[str, float]:
        return {"sum": 0.0, "measured": 0, "steps": 0}

    def observe(
        self, state: Mapping[str, float], statistics: GradientStatistics, step: StepScale
    ) -> Mapping[str, float]:
        added = {"sum": state["sum"] + statistics.variance_trace, "measured": state["measured"] + 1}
        return {**state, **added}

    def factor(self, state: Mapping[str, float], step: StepScale) -> float:
        return 1 + state["sum"] + 0.01 * state["steps"]

    def progress(self, state: Mapping[str, float], step: StepScale) -> float:
        return self.share * step.global_batch_size

    def advance(self, state: Mapping[str, float], step: StepScale) -> Mapping[str, float]:
        self.seen.append((dict(state), step))
        return {**state, "steps": state["steps"] + 1}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    return [{"params": first, "lr": 0.03}, {"params": second, "lr": 0.7}]


def test_every_group_has_its_initial_rate_times_schedule_times_rule() -> None:
    model, schedule = make_model(), ada.CosineSchedule(warmup_samples=100, floor=0.1)
    optimizer = torch.optim.SGD(groups(model), momentum=0.9)
    engine = make_engine(model, optimizer, policy=Sizes(), rate=Root(base_batch_size=7), lr_schedule=schedule)
    for step in engine:
        before, size = engine.samples_seen, step.global_batch_size
        step.run(mean_loss(model))
        decision = step.update()
        factor = (size / 7) ** 0.5
        assert [group["lr"] for group in optimizer.param_groups] == [
            initial * schedule(before, 700) * factor for initial in (0.03, 0.7)
        ]
        assert decision.lr == optimizer.param_groups[0]["lr"]
        assert engine.progress == engine.samples_seen


def test_the_rate_at_a_number_of_samples_is_the_same_for_every_trace() -> None:
    """Difference 0, whatever sizes came before; two traces meet at some numbers of samples."""
    schedule, found = ada.CosineSchedule(warmup_samples=50, floor=0.1), []
    for seed in (0, 1):
        model = make_model()
        optimizer = Recording(model.parameters(), lr=0.05)
        engine = make_engine(model, optimizer, policy=Sizes(largest=6, seed=seed), lr_schedule=schedule)
        rates = {}
        for step in engine:
            before = engine.samples_seen
            step.run(mean_loss(model))
            rates[before] = step.update().lr
        found.append(rates)
    shared = sorted(found[0].keys() & found[1].keys())
    assert len(shared) > 20
    assert [found[0][n] for n in shared] == [found[1][n] for n in shared]


def test_a_batch_that_shrinks_back_has_its_old_rate_bit_for_bit() -> None:
    model = make_model()
    optimizer = Recording(model.parameters(), lr=0.1)
    stages = ada.StagedBatch({0: 10, 100: 30, 400: 10})
    train(make_engine(model, optimizer, policy=stages, rate=Root()))
    assert set(optimizer.rates[:10]) == {0.1}
    assert optimizer.rates[-1] == 0.1
    assert 0.1 * 3**0.5 in optimizer.rates


def test_a_rule_that_measures_is_given_every_measured_step_of_a_constant_batch(tmp_path: Any) -> None:
    model, rate = make_model(), Counting(share=1.0)
    optimizer = Recording(model.parameters(), lr=1e-3)
    measure = ada.Measure(every=2, max_examples=None)
    engine = make_engine(
        model, optimizer, policy=ada.ConstantBatch(14), rate=rate, measure=measure, total_samples=140, log_dir=tmp_path
    )
    decisions = train(engine)
    total, expected = 0.0, []
    for number, decision in enumerate(decisions):
        g = decision.observation.gradient
        assert (g is not None) == (number % 2 == 0)
        total += 0.0 if g is None else g.variance_trace  # the step's own measurement is in its own rate
        expected.append(1e-3 * (1 + total + 0.01 * number))
    assert optimizer.rates == pytest.approx(expected, rel=1e-12)
    lines = [line for line in read_log(tmp_path) if line["kind"] == "step"]
    assert [line["rate_factor"] for line in lines] == pytest.approx([e / 1e-3 for e in expected], rel=1e-12)
    assert [line["progress"] for line in lines] == [14.0 * k for k in range(1, 11)]
    assert read_log(tmp_path)[0]["rate"].startswith("Counting(")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rule_that_counts_progress_ends_the_run_and_indexes_the_schedule(workers: int) -> None:
    model = make_model()
    optimizer = Recording(model.parameters())
    data: Any = None
    if workers:
        data = torch.utils.data.DataLoader(make_data(), num_workers=workers)
    schedule = ada.StepSchedule({150: 0.5})
    engine = make_engine(
        model, optimizer, data, policy=ada.ConstantBatch(20), rate=Counting(), lr_schedule=schedule, total_samples=300
    )
    train(engine)
    assert (engine.steps, engine.samples_seen, engine.progress) == (30, 600, 300.0)  # twice the budget: half a step
    factors = [state["sum"] + 1 + 0.01 * state["steps"] for state, _ in engine.learning_rate.rule.seen]
    planned = [rate / (0.05 * f) for rate, f in zip(optimizer.rates, factors, strict=True)]
    assert planned == pytest.approx([1.0] * 15 + [0.5] * 15, rel=1e-12)
    assert [step.progress for _, step in engine.learning_rate.rule.seen] == [10.0 * k for k in range(30)]


@pytest.mark.parametrize("at", [1, 7, 18])
def test_resuming_in_the_middle_is_exact(at: int, tmp_path: Any) -> None:
    def make() -> Any:
        model = make_model(dropout=0.3)
        optimizer = torch.optim.SGD(groups(model), momentum=0.9)
        schedule = ada.CosineSchedule(warmup_samples=30)
        measure = ada.Measure(every=3)
        return make_engine(
            model, optimizer, policy=Sizes(), rate=Counting(), lr_schedule=schedule, measure=measure, total_samples=200
        )

    torch.manual_seed(5)
    whole = make()
    expected = train(whole)
    torch.manual_seed(5)
    first = make()
    train(first, steps=at)
    first.save(tmp_path / "state.pt")
    second = make()
    second.load(tmp_path / "state.pt")
    rest = train(second)
    assert [(d.lr, d.samples_seen, d.plan) for d in rest] == [(d.lr, d.samples_seen, d.plan) for d in expected[at:]]
    assert second.progress == whole.progress
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_is_given_up_or_skipped_leaves_no_trace_in_the_rule() -> None:
    model = make_model()
    engine = make_engine(model, policy=ada.ConstantBatch(20), rate=Counting(), measure=ada.Measure(every=1))
    train(engine, steps=3)
    before = copy.deepcopy(engine.learning_rate.state_dict())
    for step in engine:
        step.run(mean_loss(model))
        break
    assert engine.learning_rate.state_dict() == before
    for step in engine:
        step.run(lambda batch: mean_loss(model)(batch) * float("nan"))
        step.update()
        break
    assert engine.skipped == 1
    assert engine.learning_rate.state_dict() == before


def test_a_failing_optimizer_leaves_no_trace_in_the_rule() -> None:
    model = make_model()
    optimizer = Failing(model.parameters())
    engine = make_engine(
        model, optimizer, policy=ada.ConstantBatch(20), rate=Counting(), measure=ada.Measure(every=1, max_examples=None)
    )
    train(engine, steps=2)
    before = copy.deepcopy(engine.learning_rate.state_dict())
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="no"):
        train(engine, steps=1)
    assert engine.learning_rate.state_dict() == before


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (Root, "rate must be an instance, got the class: write Root()"),
        (0.1, "rate must be a learning-rate rule such as AdaScale() or None, got 0.1"),
    ],
)
def test_what_is_no_rule_is_refused(rate: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        make_engine(make_model(), rate=rate)
    assert message in str(error.value)


def test_a_second_owner_of_the_rate_is_refused() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    with pytest.raises(InvalidArgument, match="rate would be a second owner of the learning rate beside the torch"):
        make_engine(model, optimizer, rate=Root())


def test_a_rate_changed_from_outside_is_an_error() -> None:
    model = make_model()
    engine = make_engine(model, rate=Root())
    train(engine, steps=1)
    engine.optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(InvalidArgument, match="leave rate out to set the rate yourself"):
        train(engine, steps=1)


def test_a_step_that_does_not_begin_leaves_no_trace_in_the_measuring() -> None:
    engine = make_engine(make_model(), rate=Root())
    train(engine, steps=5)
    before = copy.deepcopy(engine.measuring.state_dict())
    engine.optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(InvalidArgument, match="leave rate out"):
        train(engine, steps=1)
    assert repr(engine.measuring.state_dict()) == repr(before)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (Counting(), Root(), "under another learning-rate rule than Root"),
        (Root(), None, "under another learning-rate rule than None"),
        (None, Root(), "under another learning-rate rule than Root"),
        (ada.LinearScaling(), ada.SquareRootScaling(), "under another learning-rate rule than SquareRootScaling"),
        (ada.AdaScale(), ada.AdamScale(), "under another learning-rate rule than AdamScale"),
        (ada.AdaScale(), ada.AdaScale(progress_in="samples"), "under another learning-rate rule than AdaScale"),
        (Root(), Root(base_batch_size=4), "saved with base_batch_size=12, and Root(base_batch_size=4) has 4"),
    ],
)
def test_another_rule_than_that_of_the_state_is_refused_before_anything_is_loaded(
    before: Any, after: Any, message: str
) -> None:
    first = make_engine(make_model(), rate=before, global_batch_size=12)
    train(first, steps=2)
    second = make_engine(make_model(), rate=after, global_batch_size=12)
    fresh = copy.deepcopy(second.state_dict())
    with pytest.raises(InvalidArgument) as error:
        second.load_state_dict(first.state_dict())
    assert message in str(error.value)
    assert repr(second.state_dict()) == repr(fresh)


def test_a_rule_that_takes_the_first_batch_as_its_base_takes_that_of_the_state() -> None:
    first = make_engine(make_model(), rate=Root(), global_batch_size=12)
    train(first, steps=2)
    second = make_engine(make_model(), rate=Root(), global_batch_size=20)
    second.load_state_dict(first.state_dict())
    assert second.learning_rate.base_batch_size == 12


def test_a_state_from_before_there_were_rules_and_averages_is_gone_on_from() -> None:
    whole, first = make_engine(make_model()), make_engine(make_model())
    train(whole)
    train(first, steps=3)
    state = copy.deepcopy(first.state_dict())
    state["learning_rate"] = {"initial": state["learning_rate"]["initial"]}
    del state["measuring"]["averaging"]
    second = make_engine(make_model())
    second.load_state_dict(state)
    assert second.progress == first.samples_seen
    train(second)
    assert second.progress == second.total_samples
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(InvalidArgument, match="under another learning-rate rule than Root"):
        make_engine(make_model(), rate=Root()).load_state_dict(state)
