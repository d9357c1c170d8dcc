"""Averages over steps: the definition, what they are for, and that they can be saved, undone and used in a meter."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics
from adadagrad.statistics.base import Request
from adadagrad.statistics.combining import combination
from adadagrad.statistics.example_instrument import ExampleInstrument
from adadagrad.statistics.planner import StepSize
from adadagrad.statistics.running import RunningStatistics
from adadagrad.statistics.standard_errors import grad_norm_sq_error
from tests.statistics.checking import BLOCKS, floats

FIELDS = ("grad_norm_sq", "variance_trace", "inner_product_variance", "coordinate_ratio")
STEP = StepSize(8, 4, 8, 4)
ERRORS = ("variance_trace_error", "grad_norm_sq_error")


def step(b: int = 4, s: float = 6.0, v: float = 8.0, **more: object) -> GradientStatistics:
    return GradientStatistics(num_examples=b, grad_norm_sq=s, variance_trace=v, **more)


def averaged(decay: float, *steps: GradientStatistics) -> GradientStatistics:
    """What a fresh average returns after these steps."""
    running = RunningStatistics(decay)
    for statistics in steps:
        result = running.update(statistics, ())
    return result


def gaussian(b: int, mean: Tensor, deviation: Tensor, generator: torch.Generator) -> GradientStatistics:
    """A step whose per-example gradients (b, d) are independent Gaussians, with its standard errors."""
    rows = mean + deviation * torch.randn(b, len(mean), generator=generator, dtype=torch.float64)
    statistics = ada.statistics_from_units(rows)
    spread = float((rows - rows.mean(0)).square().sum(1).std()) / math.sqrt(b)
    return replace(
        statistics,
        variance_trace_error=spread,
        grad_norm_sq_error=grad_norm_sq_error(statistics.inner_product_variance, 1 / b),
    )


def test_the_first_step_is_returned_as_it_is() -> None:
    only = step(inner_product_variance=12.0, coordinate_ratio=3.0, variance_trace_error=0.5, grad_norm_sq_error=0.25)
    result = averaged(0.95, only)
    for field in FIELDS + ERRORS:
        assert getattr(result, field) == pytest.approx(getattr(only, field), rel=1e-14)


def test_averages_computed_by_hand() -> None:
    """Weights 1/2 and 1: V = (4 + 2) / 1.5, G^2 = (4/2 + 1) / 1.5, at b = 8; Vp / s = (1/2 * 2 + 1/2) / 1.5."""
    first = step(4, 6.0, 8.0, inner_product_variance=12.0, coordinate_ratio=0.5)
    second = step(8, 1.25, 2.0, inner_product_variance=0.625, coordinate_ratio=0.25)
    result = averaged(0.5, first, second)
    assert result.variance_trace == pytest.approx(4.0, rel=1e-14)
    assert result.true_grad_norm_sq == pytest.approx(2.0, rel=1e-14)
    assert result.grad_norm_sq == pytest.approx(2.5, rel=1e-14)
    assert result.inner_product_variance == pytest.approx(2.5, rel=1e-14)
    assert result.coordinate_ratio == pytest.approx(1.5 / (0.5 * 2 + 4), rel=1e-14)
    assert result.noise_scale == pytest.approx(2.0, rel=1e-14)


def test_errors_computed_by_hand() -> None:
    """sum w^2 e^2 = 1/4 * 4 + 9; s adds to the first step's error that of V times 1/8 - 1/4."""
    first = step(4, variance_trace_error=2.0, grad_norm_sq_error=1.0)
    second = step(8, variance_trace_error=3.0, grad_norm_sq_error=0.5)
    result = averaged(0.5, first, second)
    assert result.variance_trace_error == pytest.approx(math.sqrt(10.0) / 1.5, rel=1e-14)
    s_error = math.sqrt((1 + (2 / 8) ** 2) / 4 + 0.25) / 1.5
    assert result.grad_norm_sq_error == pytest.approx(s_error, rel=1e-14)


def test_the_definition_written_slowly() -> None:
    generator, mean, deviation = torch.Generator().manual_seed(3), torch.ones(5).double(), torch.arange(1, 6).double()
    decay, seen, running = 0.8, [], RunningStatistics(0.8)
    for k in range(30):
        measured = gaussian(4 + 3 * (k % 5), mean, deviation, generator)
        seen.append(replace(measured, coordinate_ratio=1.0 + k % 7, weight_sq_sum=1.5 / measured.num_examples))
        result = running.update(seen[-1], ())
        weights = [decay ** (k - j) for j in range(k + 1)]
        c = [x.mean_variance_factor for x in seen]

        def mean_of(values: list[float], weights: list[float] = weights) -> float:
            return math.fsum(w * x for w, x in zip(weights, values, strict=True)) / math.fsum(weights)

        def error_of(errors: list[float], weights: list[float] = weights) -> float:
            return math.sqrt(math.fsum((w * e) ** 2 for w, e in zip(weights, errors, strict=True))) / sum(weights)

        v = mean_of([x.variance_trace for x in seen])
        s = mean_of([x.true_grad_norm_sq for x in seen]) + v * c[-1]
        s_errors = [
            math.hypot(x.grad_norm_sq_error, (c[-1] - f) * x.variance_trace_error) for x, f in zip(seen, c, strict=True)
        ]
        expected = {
            "variance_trace": v,
            "grad_norm_sq": s,
            "inner_product_variance": mean_of([x.inner_product_variance / x.grad_norm_sq for x in seen]) * s,
            "coordinate_ratio": 1 / mean_of([1 / x.coordinate_ratio for x in seen]),
            "variance_trace_error": error_of([x.variance_trace_error for x in seen]),
            "grad_norm_sq_error": error_of(s_errors),
        }
        for field, value in expected.items():
            assert getattr(result, field) == pytest.approx(value, rel=1e-10), field
        for field in ("num_examples", "num_units", "kind", "weight_sq_sum"):
            assert getattr(result, field) == getattr(seen[-1], field)


@pytest.mark.parametrize("b", [4, 64, 1000])
def test_s_is_rebuilt_for_the_present_batch_size(b: int) -> None:
    """Exact statistics of one distribution, |grad F|^2 = 3 and V = 8: the last step's own numbers come out at any b."""
    steps = [step(n, 3.0 + 8.0 / n, 8.0) for n in (4, 16, 7, b)]
    result = averaged(0.9, *steps)
    assert result.grad_norm_sq == pytest.approx(3.0 + 8.0 / b, rel=1e-13)
    assert result.true_grad_norm_sq == pytest.approx(3.0, rel=1e-13)


def test_the_noise_scale_of_the_averages_is_right_where_that_of_single_steps_is_not() -> None:
    generator = torch.Generator().manual_seed(5)
    mean, deviation, b = torch.zeros(20).double(), torch.full((20,), math.sqrt(2.0)).double(), 8
    mean[0] = 1.0
    running, singles = RunningStatistics(0.999), []
    for _ in range(4000):
        single = gaussian(b, mean, deviation, generator)
        singles.append(single)
        result = running.update(single, ())
    truth = 40.0
    negative = sum(x.true_grad_norm_sq <= 0 for x in singles) / len(singles)
    finite = [x.noise_scale for x in singles if math.isfinite(x.noise_scale)]
    assert negative > 0.25
    assert sum(finite) / len(finite) > 2 * truth
    relative = math.hypot(
        result.variance_trace_error / result.variance_trace, result.grad_norm_sq_error / result.true_grad_norm_sq
    )
    assert relative < 0.08
    assert abs(result.noise_scale - truth) < 2 * relative * truth
    assert result.variance_trace / result.grad_norm_sq < truth / 4  # what |g|^2 itself would have said


def test_the_errors_of_the_averages_cover_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(7)
    mean, deviation = torch.linspace(0.5, 1.5, 6).double(), torch.linspace(1, 2, 6).double()
    trace, norm_sq = float(deviation.square().sum()), float(mean.square().sum())
    inside = {"variance_trace": 0, "grad_norm_sq": 0}
    for _ in range(150):
        running = RunningStatistics(0.9)
        for k in range(45):
            single = gaussian(24 if k < 36 else 48, mean, deviation, generator)
            result = running.update(single, ())
        truth = {"variance_trace": trace, "grad_norm_sq": norm_sq + trace / 48}
        for field, value in truth.items():
            inside[field] += abs(getattr(result, field) - value) < 1.96 * getattr(result, field + "_error")
    assert 0.9 <= inside["variance_trace"] / 150 <= 0.99
    assert 0.9 <= inside["grad_norm_sq"] / 150 <= 0.99
    same = averaged(0.9, *[step(variance_trace_error=1.0, grad_norm_sq_error=2.0)] * 300)
    shrunk = math.sqrt(0.1 / 1.9)
    assert same.variance_trace_error == pytest.approx(shrunk, rel=1e-9)
    assert same.grad_norm_sq_error == pytest.approx(2 * shrunk, rel=1e-9)


def test_the_part_across_the_gradient_stays_positive_while_the_gradient_shrinks() -> None:
    generator = torch.Generator().manual_seed(11)
    running = RunningStatistics(0.95)
    for k in range(100):
        mean = torch.full((8,), 2.0 * 0.9**k).double()
        single = gaussian(16, mean, torch.linspace(0.1, 1.0, 8).double(), generator)
        result = running.update(single, ())
        assert 0 < result.orthogonal_variance < result.variance_trace
        assert result.inner_product_variance / result.grad_norm_sq < 8.0


@pytest.mark.parametrize(
    "broken", [step(v=math.nan), step(v=math.inf), step(s=math.nan), step(s=math.inf), step(s=math.inf, v=math.inf)]
)
def test_a_step_that_is_not_finite_is_left_out(broken: GradientStatistics) -> None:
    good = step(variance_trace_error=1.0, grad_norm_sq_error=0.5, inner_product_variance=12.0)
    running = RunningStatistics(0.9)
    assert running.update(broken, ()) is broken  # nothing to put in its place
    running.update(good, ())
    before = running.state_dict()
    broken = replace(broken, num_examples=16, inner_product_variance=math.nan)
    result = running.update(broken, ())
    assert running.state_dict() == before
    assert (result.num_examples, result.variance_trace) == (16, 8.0)
    assert result.grad_norm_sq == pytest.approx(4.0 + 8.0 / 16, rel=1e-14)
    assert result.inner_product_variance == pytest.approx(2.0 * 4.5, rel=1e-14)
    assert result.variance_trace_error == pytest.approx(1.0, rel=1e-14)


def test_an_infinite_ratio_counts_as_no_signal_and_one_that_is_nan_is_left_out() -> None:
    ratios = (1.0, math.inf, math.nan)
    assert averaged(0.5, *(step(coordinate_ratio=r) for r in ratios)).coordinate_ratio == pytest.approx(3.0, rel=1e-14)
    assert averaged(0.5, step(coordinate_ratio=math.inf)).coordinate_ratio == math.inf
    assert math.isnan(averaged(0.5, step(coordinate_ratio=math.nan)).coordinate_ratio)


def test_s_is_never_negative_and_a_signal_below_zero_asks_for_an_infinite_batch() -> None:
    result = averaged(0.5, step(b=2, s=1.0, v=8.0), step(b=1000, s=0.001, v=8.0))
    assert result.grad_norm_sq == 0.0
    assert result.true_grad_norm_sq < 0
    assert result.noise_scale == math.inf
    assert ada.NormTest().required_batch_size(ada.Observation(gradient=result)) == math.inf


def test_what_the_present_step_lacks_is_lacking() -> None:
    full = step(inner_product_variance=12.0, coordinate_ratio=1.0, variance_trace_error=1.0, grad_norm_sq_error=0.5)
    result = averaged(0.5, full, step())
    for field in ("inner_product_variance", "coordinate_ratio", *ERRORS):
        assert getattr(result, field) is None
    again = averaged(0.5, full, step(), full)  # the step without an error counts as the mean of the others
    assert again.variance_trace_error == pytest.approx(math.sqrt(1 / 16 + 1 / 4 + 1) / 1.75, rel=1e-14)
    assert averaged(0.5, replace(full, grad_norm_sq_error=None)).grad_norm_sq_error is None
    without = averaged(0.5, full, replace(full, variance_trace_error=None))  # s is rebuilt with V, and so is its error
    assert without.variance_trace_error is without.grad_norm_sq_error is None


def test_resuming_repeats_every_bit_and_a_state_undoes_a_step() -> None:
    generator = torch.Generator().manual_seed(1)
    steps = [gaussian(8, torch.ones(3).double(), torch.ones(3).double(), generator) for _ in range(20)]
    whole = RunningStatistics(0.9)
    for k, statistics in enumerate(steps):
        expected = whole.update(statistics, ())
        if k == 9:
            state = whole.state_dict()
            file = io.BytesIO()
            torch.save(state, file)
            kept = copy.deepcopy(state)
    assert state == kept
    file.seek(0)
    resumed = RunningStatistics(0.9)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for statistics in steps[10:]:
        result = resumed.update(statistics, ())
    assert result == expected
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


def linear() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def test_a_meter_gives_the_average_of_what_it_would_have_measured_and_explains_itself() -> None:
    model = linear()
    plain = ada.GradientMeter(model, ada.PerExample(), inner_products=True, coordinates=BLOCKS)
    smooth = ada.GradientMeter(
        model, ada.ExponentialAverage(ada.PerExample(), decay=0.7), inner_products=True, coordinates=BLOCKS
    )
    assert "nothing is measured yet" in smooth.explain()
    running = RunningStatistics(0.7)
    for n in (6, 9, 5):
        x = floats(n, 4)
        found = []
        for meter in (plain, smooth):
            model.zero_grad()
            with meter:
                model(x).square().mean().backward()
            found.append(meter.statistics())
        assert found[1] == running.update(found[0], ())
    first, *rest = smooth.explain().splitlines()
    assert first == f"ExponentialAverage(estimator={ada.PerExample()!r}, decay=0.7)"
    assert rest == plain.explain().splitlines()[1:]


def test_auto_takes_micro_batches_where_examples_mix() -> None:
    plain, mixing = linear(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    automatic = ada.ExponentialAverage()
    assert automatic.innermost is automatic
    assert automatic.settled(plain) == ada.ExponentialAverage(ada.PerExample())
    assert automatic.settled(plain).innermost == ada.PerExample()
    assert automatic.settled(mixing).innermost == ada.MicroBatch()
    given = ada.ExponentialAverage(ada.ExponentialAverage(ada.Probe()))
    assert given.innermost == ada.Probe()
    assert given.settled(plain) == given
    assert isinstance(automatic.open(plain, Request()).innermost, ExampleInstrument)
    text = ada.GradientMeter(mixing, automatic).explain()
    assert text.startswith("ExponentialAverage(estimator=MicroBatch(units=4), decay=0.95)\ncounts every parameter")


def test_the_instrument_hands_everything_on() -> None:
    model, x = linear(), floats(6, 4)
    instrument = ada.ExponentialAverage(ada.PerExample(), decay=0.5).open(model, Request())
    for rows in (x, 2 * x):
        model.zero_grad()
        with instrument.micro_batch():
            model(rows).square().mean().backward()
        last = instrument.finish()
    assert instrument.seconds == instrument.inner.seconds > 0
    instrument.seconds = 7.0
    assert instrument.inner.seconds == 7.0
    other = ada.ExponentialAverage(ada.PerExample(), decay=0.5).open(model, Request())
    other.load_state_dict(instrument.state_dict())
    assert other.state_dict() == instrument.state_dict()
    plain, running = ada.PerExample().open(model, Request()), RunningStatistics(0.5)
    running.load_state_dict(instrument.state_dict()["average"])
    found = []
    for measuring in (instrument, other, plain):  # one part of a step is measured, the other is not
        model.zero_grad()
        with measuring.micro_batch(coefficients=1 / 6):
            (model(x[:3]).square().sum() / 6).backward()
        measuring.close_group()
        (model(x[3:]).square().sum() / 6).backward()
        found.append(measuring.finish(6))
    assert found[0] == found[1] == running.update(found[2], ()) != last


def test_the_arguments_of_an_instrument_reach_the_one_that_measures() -> None:
    """Units 1 and 3 of two examples, added up under half their weight: V = 2 (1 - 2)^2 + 2 (3 - 2)^2, s = 4."""
    model = nn.Linear(1, 1, bias=False).double()
    instrument = ada.ExponentialAverage(ada.MicroBatch()).open(model, Request())
    with instrument.micro_batch(2):
        (1e6 * model(floats(2, 1)).mean()).backward()
    instrument.discard()  # nothing of it is left
    model.zero_grad()
    for value in (1.0, 3.0):
        with instrument.micro_batch(num_examples=2, coefficients=1 / 8):
            (model(torch.full((2, 1), value).double()).mean() / 4).backward()
    model.weight.grad *= 2
    result = instrument.finish(8, 0.2, 2.0)
    assert (result.num_examples, result.weight_sq_sum, result.num_units) == (8, 0.2, 2)
    assert result.variance_trace == pytest.approx(4.0, rel=1e-14)
    assert result.grad_norm_sq == pytest.approx(4.0, rel=1e-14)
    compiled = ada.ExponentialAverage(ada.MicroBatch()).open(torch.compile(model, backend="eager"), Request())
    assert compiled.compiled == compiled.inner.compiled != instrument.compiled == ""
    assert instrument.costs(STEP, "cpu") == instrument.inner.costs(STEP, "cpu")


def test_combinations_by_what_a_policy_asks_for() -> None:
    assert combination(None, 10) is None
    assert isinstance(combination(0.9, None), RunningStatistics)
    assert combination("epoch", 10).dataset_size == 10
    with pytest.raises(InvalidArgument, match="give dataset_size"):
        combination("epoch", None)
    for wrong in ("run", True, [0.9]):
        with pytest.raises(InvalidArgument, match='averaging must be a decay in \\(0, 1\\), "epoch" or None'):
            combination(wrong, 10)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.0, 1.5, math.nan, "0.9"])
def test_a_decay_out_of_range_is_refused(decay: object) -> None:
    for build in (RunningStatistics, lambda d: ada.ExponentialAverage(decay=d), lambda d: combination(d, None)):
        with pytest.raises(InvalidArgument, match=r"(decay|averaging) must be"):
            build(decay)


def test_what_is_no_estimator_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="estimator must be an instance"):
        ada.ExponentialAverage(ada.PerExample)
    with pytest.raises(InvalidArgument, match='estimator must be "auto" or an estimator'):
        ada.ExponentialAverage("probe")
