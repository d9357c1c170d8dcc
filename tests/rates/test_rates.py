"""What holds for every learning-rate rule in the table, and what single ones promise beyond it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adadagrad
import adadagrad.rates
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import LearningRateRule, RateState
from adadagrad.core.records import GradientStatistics
from adadagrad.core.step_scale import StepScale
from adadagrad.rates import (
    LEGW,
    AbstractRate,
    AccumulatorScale,
    AdamScale,
    AdaScale,
    LinearScaling,
    Seesaw,
    SquareRootScaling,
)
from adadagrad.rates.gain import AbstractGainRate, gain
from tests.rates.cases import CASES, RateCase, Visit, at, noise

GAIN_RULES = [case for case in CASES if isinstance(case.rule, AbstractGainRate)]
VALUES = [0.0, -1e-9, 1e-300, 1.0, 1e99, 1e308, math.nan, math.inf, -math.inf]
POSITIVE = st.floats(1e-3, 1e3)


def rows(*parts: str, cases: list[RateCase] = CASES) -> Any:
    """Parametrise over the table, or over one entry of a column of it at a time."""
    if not parts:
        return pytest.mark.parametrize("case", cases, ids=lambda case: repr(case.rule))
    entries = [
        pytest.param(case, *(entry if len(parts) > 2 else (entry,)), id=f"{case.rule!r}-{number}")
        for case in cases
        for number, entry in enumerate(getattr(case, parts[0]))
    ]
    return pytest.mark.parametrize(("case", *parts[1:]), entries)


def unchanged(call: Any, state: RateState, *arguments: Any) -> Any:
    """Call twice: the same answer, and the state handed in as it was."""
    before = dict(state)
    first, second = call(state, *arguments), call(state, *arguments)
    assert first == second
    assert state == before
    return first


def test_every_exported_rule_has_a_row() -> None:
    exported = {getattr(adadagrad.rates, name) for name in adadagrad.rates.__all__}
    concrete = {
        value
        for value in exported
        if inspect.isclass(value) and issubclass(value, AbstractRate) and not inspect.isabstract(value)
    }
    assert {type(case.rule) for case in CASES} == concrete
    assert {rule.__name__ for rule in concrete} <= set(adadagrad.__all__)


@rows("answers", "step", "expected")
def test_answer(case: RateCase, step: StepScale, expected: float) -> None:
    answer = unchanged(case.rule.factor, case.rule.start(), step)
    assert isinstance(answer, float)
    assert answer == pytest.approx(expected, rel=1e-12, abs=1e-12)


@rows("walks", "walk")
def test_walk(case: RateCase, walk: tuple[Visit, ...]) -> None:
    rule: LearningRateRule = case.rule
    state = rule.start()
    for visit in walk:
        step = at(visit.scale)
        if visit.statistics is not None:
            state = unchanged(rule.observe, state, visit.statistics, step)
        assert unchanged(rule.factor, state, step) == pytest.approx(visit.factor, rel=1e-12)
        progress = unchanged(rule.progress, state, step)
        assert progress == pytest.approx(4 * visit.progress, rel=1e-12)
        assert isinstance(progress, float)
        state = unchanged(rule.advance, state, step)


@rows("bad_arguments", "arguments", "message")
def test_bad_arguments(case: RateCase, arguments: dict[str, Any], message: str) -> None:
    fields = [field for field in dataclasses.fields(case.rule) if field.default is dataclasses.MISSING]  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as error:
        type(case.rule)(**({field.name: 1.0 for field in fields} | arguments))
    assert message in str(error.value)


@rows()
def test_is_a_frozen_value(case: RateCase) -> None:
    copy = pickle.loads(pickle.dumps(case.rule))
    assert copy == case.rule
    assert hash(copy) == hash(case.rule)
    assert repr(copy) == repr(case.rule)
    assert eval(repr(copy), vars(adadagrad.rates)) == case.rule
    assert not hasattr(copy, "__dict__")
    for field in dataclasses.fields(case.rule):  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(copy, field.name, 1)


@rows()
def test_the_state_is_plain_numbers_under_fixed_names(case: RateCase) -> None:
    """It goes into a checkpoint as it is, and a rule that counts examples alone has none to speak of."""
    state: Mapping[str, float] = case.rule.start()
    names = list(state)
    for scale in (1, 4, 2):
        state = case.rule.observe(state, noise(3.0, 1.0, scale), at(scale))
        state = case.rule.advance(state, at(scale))
        assert list(state) == names
        assert all(type(value) is float for value in state.values())
    assert bool(names) == bool(case.rule.needs)


@rows()
def test_the_base_batch_keeps_its_learning_rate(case: RateCase) -> None:
    factor = case.rule.factor(case.rule.start(), at(1))
    assert (factor == 1) == case.one_at_base
    measured = case.rule.observe(case.rule.start(), noise(3.0, 1.0), at(1))
    if case.one_at_base:
        assert case.rule.factor(measured, at(1)) == 1  # bit for bit
    assert case.rule.progress(measured, at(1)) == 4.0


@rows(cases=[case for case in CASES if not case.rule.needs])
def test_growing_and_shrinking_back_restores_the_factor_bit_for_bit(case: RateCase) -> None:
    state, factors = case.rule.start(), []
    for b in (7, 21, 64, 1000, 64, 21, 7):
        step = StepScale(global_batch_size=b, base_batch_size=7, progress=500.0, dataset_size=100)
        factors.append(case.rule.factor(state, step))
        assert case.rule.progress(state, step) == b
        state = case.rule.advance(case.rule.observe(state, noise(3.0, 1.0), step), step)
    assert factors == factors[::-1]
    assert len(set(factors)) == 4
    assert not case.rule.counts_progress


@rows(cases=GAIN_RULES)
@pytest.mark.parametrize("scale", [0.25, 1, 2.5, 64])
def test_degenerate_statistics_give_a_factor_between_1_and_s(case: RateCase, scale: float) -> None:
    """NaN, infinite, negative and zero V and s: no exception, in the first step and after a good one."""
    low, high = min(1.0, scale), max(1.0, scale)
    for value, other, before in itertools.product(VALUES, VALUES, (None, noise(3.0, 1.0))):
        state = case.rule.start()
        if before is not None:
            state = case.rule.observe(state, before, at(scale))
        bad = GradientStatistics(num_examples=16, grad_norm_sq=value, variance_trace=other)
        state = case.rule.observe(state, bad, at(scale))
        for _ in range(3):
            factor = case.rule.factor(state, at(scale))
            assert low * (1 - 1e-12) <= factor <= high * (1 + 1e-12), (value, other)
            assert 4 * low <= case.rule.progress(state, at(scale)) <= 4 * high
            state = case.rule.advance(state, at(scale))


@settings(deadline=None, max_examples=300)
@given(
    variance=st.floats(allow_nan=True, allow_infinity=True),
    norm_sq=st.floats(allow_nan=True, allow_infinity=True),
    scale=st.floats(1e-9, 1e9),
)
def test_the_gain_lies_between_1_and_the_scale(variance: float, norm_sq: float, scale: float) -> None:
    assert min(1.0, scale) <= gain(variance, norm_sq, scale) <= max(1.0, scale)
    assert gain(variance, norm_sq, 1) == 1


@settings(deadline=None)
@given(
    variance=st.floats(1e-3, 1e3), norm_sq=st.floats(1e-3, 1e3), scale=st.floats(0.1, 1e4), unit=st.floats(1e-3, 1e3)
)
def test_the_gain_is_its_formula_in_any_unit(variance: float, norm_sq: float, scale: float, unit: float) -> None:
    expected = (variance + norm_sq) / (variance / scale + norm_sq)
    assert gain(variance, norm_sq, scale) == pytest.approx(expected, rel=1e-9)
    assert gain(variance * unit, norm_sq * unit, scale) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("variance", "norm_sq", "scale", "expected"),
    [
        (1.0, 0.0, 8, 8.0),
        (1.0, -1.0, 8, 8.0),
        (0.0, 1.0, 8, 1.0),
        (-1.0, 1.0, 8, 1.0),
        (0.0, 0.0, 8, 1.0),
        (-1.0, -2.0, 8, 1.0),
        (math.nan, 1.0, 8, 1.0),
        (1.0, math.nan, 8, 1.0),
        (math.inf, 1.0, 8, 8.0),
        (1.0, math.inf, 8, 1.0),
        (math.inf, math.inf, 8, 1.0),
        (math.inf, -math.inf, 8, 8.0),
        (1e308, 1e308, 3, 1.5),
        (5e-324, 5e-324, 3, 1.5),
        (1.0, 0.0, 0.125, 0.125),
    ],
)
def test_limits_of_the_gain(variance: float, norm_sq: float, scale: float, expected: float) -> None:
    assert gain(variance, norm_sq, scale) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(InvalidArgument, match="scale must be > 0, got"):
        gain(1.0, 1.0, scale)


def test_defaults() -> None:
    for rule in (AdaScale(), AdamScale(), AccumulatorScale(1.0)):
        assert (rule.base_batch_size, rule.smoothing, rule.progress_in) == (None, None, "scale_invariant")
        assert rule.counts_progress
        assert rule.needs == {"grad_norm_sq", "variance_trace"}
        assert not dataclasses.replace(rule, progress_in="samples").counts_progress
    assert AdamScale().power == 0.5
    for simple in (LinearScaling(), SquareRootScaling(), Seesaw(), LEGW(1)):
        assert simple.base_batch_size is None
    assert AdaScale(64).base_batch_size == LEGW(1, 64).base_batch_size == AccumulatorScale(1, 64).base_batch_size == 64


def test_unequal_weights_enter_the_true_gradient() -> None:
    """mu^2 = s - V sum c_i^2 = 2 - 12/8, whatever b is; sigma^2 = 12/4: 3.5 / (3/4 + 0.5)."""
    statistics = GradientStatistics(num_examples=16, grad_norm_sq=2.0, variance_trace=12.0, weight_sq_sum=1 / 8)
    rule = AdaScale()
    assert rule.factor(rule.observe(rule.start(), statistics, at(4)), at(4)) == pytest.approx(2.8)


@pytest.mark.parametrize("scale", [1, 4, 64])
def test_the_warm_up_of_legw_takes_the_same_steps_at_every_scale(scale: int) -> None:
    rule, steps = LEGW(base_warmup_epochs=3), 0
    while rule.factor({}, at(scale, progress=steps * scale * 4, dataset_size=1000)) < math.sqrt(scale):
        steps += 1
    assert steps == 3 * 1000 / 4


def test_seesaw_and_square_root_are_each_others_inverse() -> None:
    for b in range(1, 200):
        step = StepScale(global_batch_size=b, base_batch_size=7)
        assert Seesaw().factor({}, step) * SquareRootScaling().factor({}, step) == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize("needs", ["variance_trace", {"variance_trace"}, frozenset({"coordinate_ratio"})])
def test_needs_that_nothing_measures_are_refused_where_they_are_written(needs: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^Mine\.needs must be a frozenset of some of grad_norm_sq, .*, got "):
        type("Mine", (AbstractRate,), {"needs": needs})


def test_a_rule_of_ones_own_may_be_as_short_as_its_formula() -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class Mine(AbstractGainRate):
        needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})
        base_batch_size: int | None = None
        smoothing: float | None = None
        progress_in: Any = "samples"

        def factor(self, state: RateState, step: StepScale) -> float:
            return 2 * self.gain(state, step)

    rule = Mine()
    assert rule.factor(rule.observe(rule.start(), noise(3.0, 1.0), at(1)), at(4)) == pytest.approx(32 / 7)
