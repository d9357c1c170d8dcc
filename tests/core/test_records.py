from __future__ import annotations

import dataclasses
import math
import pickle

import pytest

from adadagrad.core.records import BatchPlan, Decision, GradientStatistics, Observation, quotient

# b = 4, s = 5, V = 9, Vp = 20: all by hand
HAND = GradientStatistics(num_examples=4, grad_norm_sq=5.0, variance_trace=9.0, inner_product_variance=20.0)
WEIGHTED = dataclasses.replace(HAND, weight_sq_sum=0.5)


@pytest.mark.parametrize(
    ("name", "equal", "weighted"),
    [
        ("mean_variance_factor", 0.25, 0.5),
        ("orthogonal_variance", 9 - 20 / 5, 9 - 20 / 5),
        ("true_grad_norm_sq", 5 - 9 / 4, 5 - 9 / 2),
        ("noise_scale", 9 / 2.75, 9 / 0.5),
        ("critical_eta", math.sqrt(9 / (4 * 5)), math.sqrt(9 * 0.5 / 5)),
        ("critical_theta", math.sqrt(20 / (4 * 25)), math.sqrt(20 * 0.5 / 25)),
        ("critical_nu", math.sqrt(5 / (4 * 5)), math.sqrt(5 * 0.5 / 5)),
    ],
)
def test_properties_by_hand(name, equal, weighted):
    assert getattr(HAND, name) == pytest.approx(equal, rel=1e-15)
    assert getattr(WEIGHTED, name) == pytest.approx(weighted, rel=1e-15)


def test_a_test_passes_exactly_from_its_critical_constant_on():
    eta = HAND.critical_eta
    assert HAND.variance_trace / (eta**2 * HAND.grad_norm_sq) == pytest.approx(HAND.num_examples, rel=1e-15)


def test_without_inner_products_what_needs_them_is_none():
    stats = GradientStatistics(num_examples=4, grad_norm_sq=5.0, variance_trace=9.0)
    assert (stats.orthogonal_variance, stats.critical_theta, stats.critical_nu) == (None, None, None)
    assert stats.kind == "per_example"


def test_edges_give_infinity_nan_or_zero_and_never_raise():
    def of(s, v, vp=0.0):
        return GradientStatistics(num_examples=2, grad_norm_sq=s, variance_trace=v, inner_product_variance=vp)

    assert of(1.0, 4.0).noise_scale == math.inf  # noise dominates: true |grad|^2 estimated as -1
    assert of(2.0, 4.0).noise_scale == math.inf
    assert of(0.0, 4.0).critical_eta == math.inf
    assert math.isnan(of(0.0, 0.0).critical_eta)
    assert math.isnan(of(0.0, 0.0).orthogonal_variance)
    assert of(5.0, 1.0, 5.0 + 1e-15).critical_nu == 0.0  # rounding below zero is clamped
    assert math.isnan(of(5.0, math.nan).critical_eta)
    assert of(5.0, 0.0).critical_eta == of(5.0, 0.0).noise_scale == 0.0


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1.0, 4.0, 0.25),
        (1.0, 0.0, math.inf),
        (-1.0, 0.0, -math.inf),
        (1.0, -0.0, -math.inf),
        (-1.0, -0.0, math.inf),
        (0.0, 0.0, math.nan),
        (math.nan, 0.0, math.nan),
        (1.0, math.nan, math.nan),
        (math.inf, 0.0, math.inf),
        (math.inf, math.inf, math.nan),
        (1.0, math.inf, 0.0),
        (0.0, 3.0, 0.0),
    ],
)
def test_quotient_is_the_one_of_ieee_754(a, b, expected):
    found = quotient(a, b)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_records_are_frozen_keyword_only_and_pickle():
    plan = BatchPlan(global_batch_size=8, micro_batch_size=4, accumulation_steps=2)
    observation = Observation(gradient=HAND, global_batch_size=8)
    numbers = {"step": 1, "samples_seen": 8, "progress": 8, "requested": 9.5, "lr": 0.1}
    decision = Decision(observation=observation, plan=plan, next_plan=plan, reason="grow", **numbers)
    for record in (HAND, observation, plan, decision):
        assert pickle.loads(pickle.dumps(record)) == record
        name = dataclasses.fields(record)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, 3)
        with pytest.raises(TypeError):
            type(record)(1)
    assert plan.world_size == 1
    assert Observation() == Observation(samples_seen=0)
