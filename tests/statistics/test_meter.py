"""The contract of `GradientMeter`: what it measures, what it refuses, and that it can be used again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adadagrad.core.errors import (
    BatchCoupledModule,
    InvalidArgument,
    InvalidMeasurement,
    LeftoverGradients,
    StepError,
)
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics import GradientMeter, MicroBatch, PerExample, choose_estimator
from adadagrad.statistics.base import Request
from tests.oracles import naive_statistics
from tests.statistics.checking import BLOCKS, FIELDS, assert_close, floats, losses_of

X = (floats(7, 4),)


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)).double()


def losses(model: nn.Module) -> torch.Tensor:
    return losses_of(model, X)


def test_a_whole_batch_and_an_accumulated_one_give_the_loops_numbers() -> None:
    model = network()
    meter = GradientMeter(model, PerExample(), inner_products=True, coordinates=BLOCKS)
    expected = naive_statistics(model, losses, BLOCKS)
    with meter:
        losses(model).mean().backward()
    whole = meter.statistics()
    assert_close(whole, expected, 1e-12)
    assert (whole.num_examples, whole.num_units, whole.kind) == (7, 7, "per_example")
    assert whole.weight_sq_sum == pytest.approx(1 / 7, rel=1e-12)
    model.zero_grad()
    for start, size in ((0, 4), (4, 2), (6, 1)):
        with meter.micro_batch(coefficients=1 / 7):
            (losses_rows(model, start, size).sum() / 7).backward()
    assert_close(meter.statistics(), expected, 1e-12)


def test_only_the_numbers_asked_for_are_measured() -> None:
    model = network()
    meter = GradientMeter(model)
    with meter:
        losses(model).mean().backward()
    statistics = meter.statistics()
    assert statistics.inner_product_variance is None
    assert statistics.coordinate_ratio is None
    assert statistics.variance_trace_error > 0


def test_unequal_weights_give_the_weighted_variance_and_rows_of_weight_zero_are_no_examples() -> None:
    """V = (sum c |g_i|^2 - |g|^2) / (1 - sum c^2), with g = sum c_i g_i."""
    model = network()
    c = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.15, 0.25, 0.0], dtype=torch.float64)
    meter = GradientMeter(model, PerExample(), inner_products=True)
    for split in ((7,), (3, 4)):
        model.zero_grad()
        start = 0
        for part in X[0].split(split):
            weights = c[start : start + len(part)]
            with meter.micro_batch(len(part), weights):
                (weights * losses_rows(model, start, len(part))).sum().backward()
            start += len(part)
        statistics = meter.statistics()
        rows = rows_of(model)
        g = c @ rows
        p = rows @ g
        freedom = 1 - float(c.square().sum())
        expected = float((c * rows.square().sum(1)).sum() - g.square().sum()) / freedom
        expected_vp = float((c * (p - g.square().sum()).square()).sum()) / freedom
        assert statistics.variance_trace == pytest.approx(expected, rel=1e-12)
        assert statistics.inner_product_variance == pytest.approx(expected_vp, rel=1e-12)
        assert (statistics.num_examples, statistics.num_units) == (5, 5)
        assert statistics.weight_sq_sum == pytest.approx(float(c.square().sum()), rel=1e-12)


def losses_rows(model: nn.Module, start: int, size: int) -> torch.Tensor:
    """The losses of some rows, with the targets that they have in the whole batch."""
    y = model(X[0][start : start + size])
    target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype) + torch.arange(start, start + size).to(y)[:, None] / 3
    return (y - target).square().sum(1)


def rows_of(model: nn.Module) -> torch.Tensor:
    parameters = list(model.parameters())
    rows = []
    for value in losses(model):
        found = torch.autograd.grad(value, parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def test_gradients_left_over_are_refused_and_the_meter_works_after_zero_grad() -> None:
    model = network()
    losses(model).mean().backward()
    meter = GradientMeter(model)
    with pytest.raises(LeftoverGradients, match=r"0\.weight\.grad .*zero_grad"), meter:
        pass
    model.zero_grad()
    with meter:
        losses(model).mean().backward()
    assert_close(meter.statistics(), naive_statistics(model, losses))


def test_a_measurement_is_read_once_and_before_the_next() -> None:
    model = network()
    meter = GradientMeter(model)
    with pytest.raises(InvalidMeasurement, match="nothing was measured"):
        meter.statistics()
    with meter:
        losses(model).mean().backward()
    with pytest.raises(StepError, match="was not read"), meter:
        pass
    meter.statistics()
    with pytest.raises(InvalidMeasurement, match="nothing was measured"):
        meter.statistics()


def test_a_meter_inside_itself_is_refused_and_the_outer_measurement_stands() -> None:
    model = network()
    meter = GradientMeter(model)
    with meter:
        with pytest.raises(StepError), meter:
            pass
        losses(model).mean().backward()
    assert_close(meter.statistics(), naive_statistics(model, losses))


@pytest.mark.parametrize(
    ("estimator", "micro_batch"), [(PerExample(), False), (PerExample(), True), (MicroBatch(), True)], ids=str
)
def test_an_error_inside_forgets_the_step(estimator, micro_batch: bool) -> None:
    model = network()
    meter = GradientMeter(model, estimator)

    def interrupted() -> None:
        with meter.micro_batch(7) if micro_batch else meter:
            losses(model).mean().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    if not micro_batch:
        model.zero_grad()
        with pytest.raises(ZeroDivisionError):  # the meter can be entered again at once
            interrupted()
    with pytest.raises(InvalidMeasurement, match="nothing was measured"):
        meter.statistics()
    model.zero_grad()
    for part in (X[0][:4], X[0][4:]):
        with meter.micro_batch(len(part), 1 / 7):
            (losses_of(model, (part,)).sum() / 7).backward()
    assert meter.statistics().num_examples == 7


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.ones(3), "one weight for each of the 7"),
        (torch.tensor([1.0, 1, 1, 1, 1, 1, -1]), "negative"),
        (torch.tensor([1.0, 1, 1, 1, 1, 1, math.nan]), "finite"),
        (torch.zeros(7), "weight 0"),
        (0.0, "weight 0"),
    ],
    ids=["too few", "negative", "nan", "all zero", "zero"],
)
def test_weights_that_mean_nothing_are_refused(weights, match: str) -> None:
    model = network()
    meter = GradientMeter(model, PerExample())
    with meter.micro_batch(7, weights):
        losses(model).mean().backward()
    with pytest.raises((InvalidArgument, InvalidMeasurement), match=match):
        meter.statistics()


def test_auto_measures_micro_batches_where_examples_mix() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert choose_estimator(model) == MicroBatch()
    assert choose_estimator(model.eval()) == PerExample()
    model.train()
    with pytest.raises(BatchCoupledModule, match=r"1 \(BatchNorm1d\)"):
        GradientMeter(model, PerExample())
    meter = GradientMeter(model)
    with pytest.raises(InvalidArgument, match=r"micro_batch\(num_examples\)"), meter:
        pass
    for part in X[0].float().split((4, 3)):
        with meter.micro_batch(len(part), 1 / 7):
            (model(part).square().sum() / 7).backward()
    assert meter.statistics().kind == "micro_batch"


def test_a_batch_norm_put_into_training_mode_later_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    meter = GradientMeter(model, PerExample())
    model.train()
    with pytest.raises(BatchCoupledModule), meter:
        pass


def test_coordinates_that_a_meter_cannot_measure_are_refused_at_once() -> None:
    for reduction, message in (
        (CoordinateReduction(kind="weighted"), "needs the second moments .* use AdaptiveBatch, or another kind"),
        ("max", r"coordinates must be CoordinateReduction\(kind=\"max\"\) or the like, got 'max'"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            GradientMeter(network(), coordinates=reduction)


def test_an_estimator_that_is_none_is_refused() -> None:
    for estimator, message in (
        ("probe", r"estimator must be \"auto\" or an estimator such as PerExample\(\) or Probe\(\), got 'probe'"),
        (PerExample, r"estimator must be an instance, got the class: write PerExample\(\)"),
        (None, "estimator must be .* got None"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            GradientMeter(network(), estimator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "scale must be > 0, got 0"),
        ({"scale": -1.0}, "scale must be > 0, got -1.0"),
        ({"scale": math.nan}, "scale must be > 0, got nan"),
        ({"scale": torch.tensor(2.0)}, r"scale must be > 0, .*: write float\(\.\.\.\) around it"),
        ({"num_examples": 0}, "num_examples must be >= 1, got 0"),
        ({"num_examples": 7.0}, r"num_examples must be an integer, got 7.0: write int\(\.\.\.\)"),
    ],
    ids=["zero", "negative", "nan", "tensor", "no examples", "float"],
)
def test_numbers_that_mean_nothing_are_refused_and_the_measurement_can_still_be_read(options, message: str) -> None:
    model = network()
    meter = GradientMeter(model)
    with meter:
        losses(model).mean().backward()
    with pytest.raises(InvalidArgument, match=message):
        meter.statistics(**options)
    assert_close(meter.statistics(), naive_statistics(model, losses))


def test_a_change_of_scale_after_a_measured_part_changes_nothing() -> None:
    """The part's gradient was noted before it, so its sums must not be scaled; p_i is with the scaled gradient."""
    model = network()

    def part_of_seven(provisional: int) -> tuple[float | None, ...]:
        instrument = PerExample().open(model, Request(inner_products=True, coordinates=BLOCKS))
        model.zero_grad()
        with instrument.micro_batch(4, 1 / provisional):
            (losses_rows(model, 0, 4).sum() / provisional).backward()
        instrument.close_group()
        (losses_rows(model, 4, 3).sum() / provisional).backward()
        for p in model.parameters():
            p.grad *= provisional / 7
        statistics = instrument.finish(7, scale=provisional / 7)
        return tuple(getattr(statistics, field) for field in FIELDS)

    assert part_of_seven(11) == pytest.approx(part_of_seven(7), rel=1e-12)


def test_what_is_no_model_and_what_is_no_number_of_examples_are_refused() -> None:
    model = network()
    with pytest.raises(InvalidArgument, match=r"model must be a torch\.nn\.Module, got list"):
        GradientMeter(list(model.parameters()))
    meter = GradientMeter(model)
    for number, message in ((0, "must be >= 1, got 0"), (2.5, "must be an integer, got 2.5")):
        with pytest.raises(InvalidArgument, match=f"num_examples {message}"), meter.micro_batch(number):
            pass
    with meter:  # nothing was begun
        losses(model).mean().backward()
    assert_close(meter.statistics(), naive_statistics(model, losses))
