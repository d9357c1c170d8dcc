"""A batch that moves only when it is sure: what noise alone does, what is refused, what is measured for it."""

from __future__ import annotations

import math

import pytest
import torch

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from tests.engine.cases import Asks, Recording, doubling, losses_of, make_data, make_engine, make_model, train
from tests.oracles import naive_statistics

B = 24
EVERY = ada.Measure(every=1, max_examples=None)


def truth() -> tuple[float, float]:
    """tr Sigma and |grad F|^2 over the whole data set, at the model's first parameters."""
    data, model = make_data(), make_model()
    found = naive_statistics(model, losses_of(data, torch.arange(len(data))))
    return found.variance_trace, found.grad_norm_sq


def standing(policy, steps=None, **bounds):
    """A run whose parameters never move, so that every change of the batch size is due to noise or to the test."""
    model = make_model()
    options = {"global_batch_size": B, "total_samples": 60 * B, "measure": EVERY, "bounds": ada.Bounds(**bounds)}
    engine = make_engine(model, Recording(model.parameters(), lr=0.0), make_data(), policy, **options)
    return train(engine, steps=steps)


def eta_for(size: float) -> float:
    """The eta with which the norm test asks for this many examples on average at B."""
    v, signal = truth()
    return math.sqrt(v / (size * (signal + v / B)))


def test_confidence_prevents_moves_that_noise_alone_would_cause() -> None:
    """On average the test asks for 0.6 B; without confidence the batch ratchets up on the largest request so far."""
    policy = ada.NormTest(eta=eta_for(0.6 * B))
    plain, sure = standing(policy), standing(policy, confidence=0.9)
    assert plain[-1].next_plan.global_batch_size > 1.3 * B
    assert {d.next_plan.global_batch_size for d in sure} == {B}
    assert {d.reason for d in sure} == {"hold", "not sure"}
    for d in sure:
        assert (d.reason == "not sure") == (math.ceil(d.requested) > B)
        assert d.requested_low < d.requested < d.requested_high


def test_where_the_test_clearly_fails_it_moves_at_once_to_the_request_itself() -> None:
    policy = ada.NormTest(eta=eta_for(2.5 * B))
    first = standing(policy, confidence=0.9, steps=1)[0]
    assert first.reason == "grow"
    assert first.next_plan.global_batch_size == math.ceil(first.requested)
    assert first.requested_low > B
    assert first.observation.gradient.grad_norm_sq_error > 0


@pytest.mark.parametrize(("size", "reason"), [(0.1 * B, "shrink"), (0.5 * B, "not sure")])
def test_it_shrinks_only_where_it_is_sure(size: float, reason: str) -> None:
    first = standing(ada.NormTest(eta=eta_for(size)), monotone=False, confidence=0.9, steps=1)[0]
    assert first.requested < B
    assert first.reason == reason
    assert (first.requested_high < B) == (reason == "shrink")


def test_a_confidence_measures_the_error_of_the_squared_gradient_and_its_absence_does_not() -> None:
    policy = ada.NormTest(eta=0.5)
    for bounds, measured in (({}, False), ({"confidence": 0.8}, True)):
        g = standing(policy, **bounds, steps=1)[0].observation.gradient
        assert (g.grad_norm_sq_error is not None) == measured
        assert (g.inner_product_variance is not None) == measured


def test_a_higher_confidence_widens_what_is_logged() -> None:
    ends = [standing(ada.NormTest(eta=0.5), confidence=c, steps=1)[0] for c in (0.6, 0.99)]
    assert ends[0].requested == ends[1].requested
    assert ends[1].requested_low < ends[0].requested_low < ends[0].requested_high < ends[1].requested_high


def test_micro_batches_too() -> None:
    model = make_model()
    measure = ada.Measure(estimator=ada.MicroBatch(units=4), every=1)
    options = {"global_batch_size": B, "total_samples": 3 * B, "measure": measure}
    policy, bounds = ada.NormTest(eta=0.5), ada.Bounds(confidence=0.9)
    first = train(make_engine(model, None, make_data(), policy, bounds=bounds, **options))[0]
    g = first.observation.gradient
    assert (g.kind, g.num_units) == ("micro_batch", 4)
    assert g.variance_trace_error > 0
    assert g.grad_norm_sq_error > 0
    assert first.reason in {"hold", "not sure", "grow"}


def test_a_step_without_an_error_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adadagrad.statistics.example_step.grad_norm_sq_error", lambda *args: None)
    decisions = standing(ada.NormTest(eta=eta_for(6 * B)), steps=5, confidence=0.6)
    assert {(d.reason, d.next_plan.global_batch_size) for d in decisions} == {("not sure", B)}
    assert all(d.requested_low > B for d in decisions)  # of V alone, which is not enough to move on


def test_schedules_are_certain() -> None:
    policy = ada.StagedBatch({0: 4, 40: 12, 100: 6})
    runs = []
    for confidence in (None, 0.99):
        engine = make_engine(make_model(), policy=policy, bounds=ada.Bounds(confidence=confidence), total_samples=150)
        runs.append([(d.reason, d.next_plan.global_batch_size) for d in train(engine)])
    assert runs[0] == runs[1]
    assert {reason for reason, _ in runs[0]} >= {"grow", "shrink"}


SURE = ada.Bounds(confidence=0.9)
REFUSED = {
    "inner product": (ada.InnerProductTest(), {}, "none for inner_product_variance, which InnerProductTest reads"),
    "augmented": (ada.AugmentedInnerProductTest(), {}, "none for inner_product_variance, which Augmented"),
    "coordinates": (ada.CoordinateNormTest(), {}, "none for coordinate_ratio, which CoordinateNormTest reads"),
    "two units": (
        ada.NormTest(),
        {"measure": ada.Measure(estimator=ada.MicroBatch(units=2))},
        r"takes 3 micro-batches, got MicroBatch\(units=2\): give it units=3",
    ),
    "one probe": (
        ada.NormTest(),
        {"measure": ada.Measure(estimator=ada.Probe(probes=1))},
        r"takes 2 probes, got Probe\(probes=1.*: give it probes=2",
    ),
    "two examples": (ada.NormTest(), {"measure": ada.Measure(max_examples=2)}, "takes 3 examples, got max_examples=2"),
    "a batch of two": (ada.NormTest(), {"global_batch_size": 2}, "global_batch_size must be >= 3 .* with its error"),
    "a batch of five": (
        ada.NormTest(),
        {"global_batch_size": 5, "measure": ada.Measure(estimator=ada.MicroBatch())},
        "global_batch_size must be >= 6 .* with its error, got 5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_never_be_sure_is_refused_before_any_training(name: str) -> None:
    policy, options, message = REFUSED[name]
    with pytest.raises(InvalidArgument, match=message):
        make_engine(make_model(), policy=policy, bounds=SURE, **options)
    make_engine(make_model(), policy=policy, **options)  # without a confidence it is allowed


def test_a_batch_never_shrinks_below_what_can_be_sure() -> None:
    policy = Asks(lambda o: 1.0 if o.samples_seen > B else doubling(o))
    decisions = standing(policy, steps=20, monotone=False, confidence=0.9)
    assert min(d.next_plan.global_batch_size for d in decisions) == 3
