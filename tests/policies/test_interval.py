"""The interval of a requested size: by hand, for every policy of the table, and Student's quantiles from tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, ClassVar

import pytest

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.policies import AbstractPolicy, ConstantBatch, InnerProductTest, NormTest
from adadagrad.policies.interval import ERRORS, errors_known, requested_interval, student_quantile
from tests.policies.cases import CASES, PolicyCase

Z = NormalDist().inv_cdf(0.9)
MANY = 10**9
NORM = NormTest(eta=0.5)  # T = 4 V / s


def observed(v_error: float | None, s_error: float | None, **changes: Any) -> Observation:
    fields = {"num_examples": MANY, "grad_norm_sq": 4.0, "variance_trace": 9.0, "inner_product_variance": 8.0}
    fields |= {"coordinate_ratio": 2.0, "variance_trace_error": v_error, "grad_norm_sq_error": s_error}
    return Observation(gradient=GradientStatistics(**fields | changes), dataset_size=1000, global_batch_size=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("v_error", "s_error", "expected"),
    [
        (1.0, None, (9 - Z, 9 + Z)),  # of V alone
        (1.0, 0.5, (4 * (9 - Z) / (4 + Z / 2), 4 * (9 + Z) / (4 - Z / 2))),  # both at their worst
        (0.0, 0.5, (36 / (4 + Z / 2), 36 / (4 - Z / 2))),
        (0.0, 0.0, (9.0, 9.0)),
        (10.0, None, (0.0, 9 + 10 * Z)),  # V is never below 0
        (1.0, 4.0, (4 * (9 - Z) / (4 + 4 * Z), math.inf)),  # the gradient may be zero
        (10.0, 4.0, (0.0, math.inf)),  # 0 / 0 at one corner does not count
        (None, 0.5, None),
        (None, None, None),
        (math.nan, 0.5, None),
        (math.inf, 0.5, None),
    ],
)
def test_the_norm_tests_interval_by_hand(
    v_error: float | None, s_error: float | None, expected: tuple[float, float] | None
) -> None:
    found = requested_interval(NORM, observed(v_error, s_error))
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-8))
    known = all(error is not None and math.isfinite(error) for error in (v_error, s_error))
    assert errors_known(NORM, observed(v_error, s_error).gradient) == known  # type: ignore[arg-type]


@pytest.mark.parametrize(("units", "quantile"), [(3, 3.0777), (4, 1.8856), (12, 1.3722), (MANY, Z)])
def test_few_units_make_it_wider(units: int, quantile: float) -> None:
    low, high = requested_interval(NORM, observed(1.0, None, num_units=units))  # type: ignore[misc]
    assert high == pytest.approx(9 + quantile, rel=1e-4)
    assert low == pytest.approx(9 - quantile, rel=1e-4)


def test_a_higher_confidence_makes_it_wider() -> None:
    ends = [requested_interval(NORM, observed(1.0, 0.5), confidence) for confidence in (0.6, 0.8, 0.9, 0.99)]
    assert [low for low, _ in ends] == sorted((low for low, _ in ends), reverse=True)  # type: ignore[misc]
    assert [high for _, high in ends] == sorted(high for _, high in ends)  # type: ignore[misc]


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.policy))
def test_every_policy_has_an_interval_around_its_answer_or_none(case: PolicyCase) -> None:
    policy, observation = case.policy, replace(observed(1.0, 0.5), loss=1.5, lr=0.1)
    found = requested_interval(policy, observation)
    assert (found is not None) == (bool(policy.needs) and policy.needs <= set(ERRORS))
    if found is not None:
        assert found[0] <= policy.required_batch_size(observation) <= found[1]  # equal where it grows by steps
        assert found[0] < found[1]
    assert requested_interval(policy, replace(observation, gradient=None)) is None


@dataclass(frozen=True, slots=True)
class NoiseScale(AbstractPolicy):
    """A policy of one's own, over a property of the record and with a plain division."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})

    def required_batch_size(self, observation: Observation) -> float:
        v, signal = self.measured(observation, "variance_trace", "true_grad_norm_sq")
        return v / signal


def test_properties_follow_the_shifted_numbers() -> None:
    low, high = requested_interval(NoiseScale(), observed(1.0, 0.5, num_examples=9, num_units=MANY))  # type: ignore[misc]
    assert low == pytest.approx((9 - Z) / (4 + Z / 2 - (9 - Z) / 9), rel=1e-8)
    assert high == pytest.approx((9 + Z) / (4 - Z / 2 - (9 + Z) / 9), rel=1e-8)


def test_a_division_by_zero_at_a_corner_does_not_count() -> None:
    found = requested_interval(NoiseScale(), observed(0.0, 10.0, variance_trace=0.0))
    assert found == (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Logarithm(AbstractPolicy):
    """A policy of one's own that has no answer where V or s is 0."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})

    def required_batch_size(self, observation: Observation) -> float:
        v, s = self.measured(observation, "variance_trace", "grad_norm_sq")
        return 8 * math.log(v / s)


def test_a_policy_without_an_answer_at_a_corner_stops_nothing() -> None:
    low, high = requested_interval(Logarithm(), observed(10.0, 0.5))  # type: ignore[misc]
    assert low == pytest.approx(8 * math.log((9 + 10 * Z) / (4 + Z / 2)))
    assert high == pytest.approx(8 * math.log((9 + 10 * Z) / (4 - Z / 2)))
    assert requested_interval(Logarithm(), observed(0.0, 0.0, variance_trace=0.0)) is None


def test_what_is_certain_or_cannot_be_known() -> None:
    assert requested_interval(ConstantBatch(8), observed(1.0, 1.0)) is None
    assert errors_known(ConstantBatch(8), observed(1.0, 1.0).gradient)  # type: ignore[arg-type]
    assert not errors_known(InnerProductTest(), observed(1.0, 1.0).gradient)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("probability", "freedom", "tabulated"),
    [
        (0.9, 1, 3.0777),
        (0.99, 1, 31.8205),
        (0.9, 2, 1.8856),
        (0.99, 2, 6.9646),
        (0.9, 3, 1.6377),
        (0.95, 3, 2.3534),
        (0.99, 3, 4.5407),
        (0.75, 4, 0.7407),
        (0.9, 10, 1.3722),
        (0.95, 30, 1.6973),
        (0.99, 120, 2.3578),
    ],
)
def test_quantiles_are_the_tabulated_ones(probability: float, freedom: int, tabulated: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(tabulated, rel=5e-3)
    assert student_quantile(1 - probability, freedom) == pytest.approx(-student_quantile(probability, freedom))


@pytest.mark.parametrize(("probability", "freedom"), [(0.0, 3), (1.0, 3), (math.nan, 3), (0.9, 0)])
def test_quantiles_out_of_range_are_refused(probability: float, freedom: int) -> None:
    with pytest.raises(InvalidArgument, match="need 0 < probability < 1 and freedom >= 1"):
        student_quantile(probability, freedom)
