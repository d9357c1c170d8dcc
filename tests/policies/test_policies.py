"""What holds for every policy in the table, and what single ones promise beyond it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

import adadagrad.policies
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import BatchSizePolicy
from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.core.settings import Bounds
from adadagrad.policies import (
    CABS,
    AbstractPolicy,
    AugmentedInnerProductTest,
    BigBatch,
    ConstantBatch,
    CoordinateNormTest,
    DiveBatch,
    GradientNoiseScale,
    InnerProductTest,
    NormTest,
    next_batch_size,
)
from tests.policies.cases import CASES, PolicyCase, measured

FIELDS = {field.name for field in dataclasses.fields(GradientStatistics)}
OPTIONAL = {"inner_product_variance", "coordinate_ratio", "variance_trace_error", "grad_norm_sq_error"}


def rows(*parts: str) -> Any:
    """Parametrise over the table, or over one entry of a column of it at a time."""
    if not parts:
        return pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.policy))
    entries = [
        pytest.param(case, *entry, id=f"{case.policy!r}-{number}")
        for case in CASES
        for number, entry in enumerate(getattr(case, parts[0]))
    ]
    return pytest.mark.parametrize(("case", *parts[1:]), entries)


def test_every_exported_policy_has_a_row() -> None:
    exported = {getattr(adadagrad.policies, name) for name in adadagrad.policies.__all__}
    concrete = {
        value
        for value in exported
        if inspect.isclass(value) and issubclass(value, AbstractPolicy) and not inspect.isabstract(value)
    }
    assert {type(case.policy) for case in CASES} == concrete


@rows("answers", "observation", "expected")
def test_answer(case: PolicyCase, observation: Observation, expected: float) -> None:
    answers = [case.policy.required_batch_size(observation) for _ in range(2)]  # twice: pure
    for answer in answers:
        assert isinstance(answer, float)
        assert answer == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


@rows("bad_arguments", "arguments", "message")
def test_bad_arguments(case: PolicyCase, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        type(case.policy)(**arguments)
    assert message in str(error.value)


@rows("bad_observations", "observation", "message")
def test_bad_observations(case: PolicyCase, observation: Observation, message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        case.policy.required_batch_size(observation)
    assert message in str(error.value)


@rows()
def test_is_a_frozen_value(case: PolicyCase) -> None:
    copy = pickle.loads(pickle.dumps(case.policy))
    assert copy == case.policy
    assert hash(copy) == hash(case.policy)
    assert repr(copy) == repr(case.policy)
    assert eval(repr(copy), vars(adadagrad.policies)) == case.policy
    field = dataclasses.fields(case.policy)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(copy, field, 1)


@rows()
def test_needs_name_the_fields_it_reads(case: PolicyCase) -> None:
    policy = case.policy
    assert policy.needs <= FIELDS
    assert ("coordinate_ratio" in policy.needs) == (policy.coordinate_reduction is not None)
    if not policy.needs:
        assert policy.required_batch_size(Observation(global_batch_size=4)) > 0  # needs no gradient
        return
    with pytest.raises(InvalidArgument, match=f"{type(policy).__name__} needs observation.gradient, got None"):
        policy.required_batch_size(Observation())
    full = {"num_examples": 8, "grad_norm_sq": 4.0, "variance_trace": 9.0, "inner_product_variance": 8.0}
    full |= {"coordinate_ratio": 2.0, "variance_trace_error": 1.0, "grad_norm_sq_error": 1.0}
    for name in OPTIONAL:
        gradient = GradientStatistics(**(full | {name: None}))  # type: ignore[arg-type]
        observation = Observation(gradient=gradient, dataset_size=100, loss=0.5, lr=0.1)
        if name in policy.needs:
            with pytest.raises(InvalidArgument, match=f"{type(policy).__name__} .*{name}, got None"):
                policy.required_batch_size(observation)
        else:
            policy.required_batch_size(observation)


@rows()
@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_scale_invariant_in_the_gradient(case: PolicyCase, scale: float) -> None:
    """A loss multiplied by c, with the learning rate that makes the same step of it, asks for the same batch."""

    def at(c: float) -> Observation:
        numbers = {"dataset_size": 1000, "global_batch_size": 8, "loss": 1.5 * c, "lr": 0.1 / c}
        return measured(s=0.37 * c**2, v=21.3 * c**2, vp=0.83 * c**4, ratio=5.1, **numbers)

    policy = case.policy if case.scaled is None else case.scaled(scale)
    expected = case.policy.required_batch_size(at(1.0))
    assert policy.required_batch_size(at(scale)) == pytest.approx(expected, rel=1e-12)


@rows()
@pytest.mark.parametrize("b", [1, 8, 100])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -1e-9, 1e308])
def test_degenerate_statistics_give_a_defined_decision(case: PolicyCase, value: float, b: int) -> None:
    """One example, NaN, zero and infinite gradients, b = N: no exception, the size in bounds or unchanged."""
    observation = measured(
        s=value, v=abs(value), vp=abs(value), ratio=value, b=b, dataset_size=100, global_batch_size=b, loss=0.5, lr=0.1
    )
    requested = case.policy.required_batch_size(observation)
    for bounds in (Bounds(), Bounds.paper()):
        size, reason = next_batch_size(
            requested, current=b, bounds=bounds, monotone=case.policy.monotone, minimum=1, maximum=100
        )
        assert 1 <= size <= 100
        if math.isnan(requested):
            assert (size, reason) == (b, "nan: hold")


@pytest.mark.parametrize(
    "make",
    [NormTest, InnerProductTest, AugmentedInnerProductTest, CoordinateNormTest, DiveBatch],
    ids=lambda c: c.__name__,
)
def test_the_tests_never_shrink(make: Any) -> None:
    assert make().monotone is True
    observation = measured(s=4.0, v=1e-6, vp=1e-6, ratio=1e-6)
    bounds = {"current": 64, "bounds": Bounds(), "monotone": make().monotone, "minimum": 1, "maximum": 100}
    assert next_batch_size(make().required_batch_size(observation), **bounds) == (64, "hold")


@pytest.mark.parametrize(("eta", "expected"), [(0.3, 20), (0.1, 180), (0.2, 45)])
def test_exact_answers_survive_rounding(eta: float, expected: int) -> None:
    requested = NormTest(eta=eta).required_batch_size(measured(s=5.0, v=9.0))
    rule = {"current": 2, "bounds": Bounds.paper(), "monotone": True, "minimum": 1, "maximum": 60_000}
    assert next_batch_size(requested, **rule) == (expected, "grow")


def test_defaults() -> None:
    assert NormTest() == NormTest(eta=0.25, finite_population="off")
    assert InnerProductTest().theta == 0.9
    assert (AugmentedInnerProductTest().theta, AugmentedInnerProductTest().nu) == (0.9, 5.84)
    assert CoordinateNormTest().coordinate_reduction == CoordinateReduction(kind="max")
    assert CoordinateNormTest(reduction="blocks").coordinate_reduction == CoordinateReduction(kind="blocks")


@rows()
def test_averaging_is_read_through_the_protocol(case: PolicyCase) -> None:
    """A field of that name takes the place of the property, also after a round trip."""
    policy: BatchSizePolicy = pickle.loads(pickle.dumps(case.policy))
    expected = {GradientNoiseScale: 0.95, CABS: 0.9, DiveBatch: "epoch"}.get(type(case.policy))
    assert policy.averaging == expected


def test_averaging_may_be_left_out() -> None:
    assert GradientNoiseScale(averaging=None).averaging is None
    assert CABS(averaging=None).averaging is None
    assert GradientNoiseScale() == GradientNoiseScale(fraction=1.0, averaging=0.95)
    assert CABS() == CABS(scale=1.0, loss_offset=0.0, averaging=0.95)
    assert DiveBatch().delta == 0.1


def test_big_batch_has_no_left_side_of_its_own() -> None:
    """threshold * requested / b would not be V / (b s), because the request is b + increment."""
    assert BigBatch(increment=8).threshold is None


@pytest.mark.parametrize(("make", "shrinks"), [(GradientNoiseScale, True), (CABS, True), (BigBatch, False)])
def test_only_the_noise_scale_and_cabs_may_shrink(make: Any, shrinks: bool) -> None:
    policy = make(increment=8) if make is BigBatch else make()
    observation = measured(s=4.0, v=1e-6, b=64, global_batch_size=64, loss=0.5, lr=0.1)
    bounds = {"current": 64, "bounds": Bounds(), "monotone": policy.monotone, "minimum": 1, "maximum": 100}
    expected = (1, "shrink") if shrinks else (64, "hold")
    assert next_batch_size(policy.required_batch_size(observation), **bounds) == expected


def test_solved_population_is_where_the_corrected_test_is_tight() -> None:
    """At b = T_fp, the published factor turns T_0 into b itself."""
    size, s, v = 1000, 0.5, 40.0
    solved = NormTest(eta=0.5, finite_population="solved").required_batch_size(measured(s, v, dataset_size=size))
    plain = NormTest(eta=0.5).required_batch_size(measured(s, v))
    assert plain == pytest.approx(320.0)
    assert plain * (size - solved) / (size - 1) == pytest.approx(solved, rel=1e-12)
    assert solved < plain


def test_threshold_is_the_right_side_of_the_test() -> None:
    """threshold * requested / b is the left side, the squared critical constant, where there is one constant."""
    observation = measured(s=0.5, v=40.0, vp=3.0, ratio=7.0, b=16)
    stats = observation.gradient
    assert stats is not None
    norm, inner = NormTest(eta=0.3), InnerProductTest(theta=0.7)
    for policy, critical in ((norm, stats.critical_eta), (inner, stats.critical_theta)):
        left = policy.threshold * policy.required_batch_size(observation) / 16
        assert left == pytest.approx((critical or 0.0) ** 2, rel=1e-12)
    assert CoordinateNormTest(eta=0.3).threshold == pytest.approx(0.09)
    assert AugmentedInnerProductTest().threshold == 1
    assert ConstantBatch(8).threshold is None


def test_a_policy_of_ones_own_may_be_as_short_as_its_formula() -> None:
    @dataclass(frozen=True, slots=True)
    class Mine(AbstractPolicy):
        needs: ClassVar[frozenset[str]] = frozenset({"variance_trace"})

        def required_batch_size(self, observation: Observation) -> float:
            return self.measured(observation, "variance_trace")[0]

    assert Mine.monotone
    assert Mine().threshold is None


@pytest.mark.parametrize("needs", [None, "variance_trace", {"variance_trace"}, frozenset({"orthogonal_variance"})])
def test_needs_that_nothing_measures_are_refused_where_they_are_written(needs: object) -> None:
    """Such a policy would fail in the middle of a run, or never be asked."""
    body = {} if needs is None else {"needs": needs}
    with pytest.raises(
        InvalidArgument, match=r"^Mine\.needs must be a frozenset of some of coordinate_ratio, .*, got "
    ):
        type("Mine", (AbstractPolicy,), body)
