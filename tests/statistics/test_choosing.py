"""``"auto"``: exact norms wherever the model of costs says so, a probe where a sketch is the better bargain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics import MicroBatch, PerExample, Probe, choosing
from adadagrad.statistics.base import Request
from adadagrad.statistics.choosing import MARGIN, PROBE_VARIANCE, SPREAD, better_estimator, probe_variance, reconsidered
from adadagrad.statistics.layer_costs import NormsBy
from adadagrad.statistics.planner import StepSize, measured_seconds
from tests.statistics.cases import GPT
from tests.statistics.checking import NORMS, floats, ids, losses_of, measure_once

SIZES = (2, 4, 8, 16, 32, 64, 128, 512)
CNN = (
    lambda: nn.Conv2d(1, 16, 5, padding=2),
    lambda: nn.ReLU(),
    lambda: nn.MaxPool2d(2),
    lambda: nn.Conv2d(16, 32, 5, padding=2),
    lambda: nn.MaxPool2d(2),
    lambda: nn.Flatten(),
    lambda: nn.Linear(1568, 10),
)
USUAL = {
    "mlp": (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), floats(4, 64)),
    "cnn": (lambda: nn.Sequential(*(layer() for layer in CNN)), floats(4, 1, 14, 14).repeat(1, 1, 2, 2)),
    "gpt": (lambda: GPT("parameter", vocabulary=65, width=96, length=64), ids(65, 4, 64)),
}


def step(n: int) -> StepSize:
    return StepSize(n, 1, n, 1)


def opened(model: nn.Module, x: Tensor, request: Request = NORMS):
    instrument = PerExample().open(model.to(torch.float64), request)
    measure_once(instrument, lambda m: losses_of(m, (x,)))
    return instrument


def wide() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)).double()


@pytest.mark.parametrize("name", USUAL)
def test_usual_models_are_measured_exactly_on_a_cpu(name: str) -> None:
    build, x = USUAL[name]
    instrument = opened(build(), x)
    for n in SIZES:
        assert better_estimator(instrument, step(n), "cpu") == PerExample()


def test_a_model_without_sketches_is_measured_exactly_anywhere() -> None:
    build, x = USUAL["mlp"]
    for device in ("cpu", "cuda"):
        assert better_estimator(opened(build(), x), step(2), device) == PerExample()


@pytest.fixture
def no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "MARGIN", 1.0)


def test_a_probe_must_be_the_better_bargain_by_far() -> None:
    instrument = opened(wide(), floats(4, 48, 256))
    assert {better_estimator(instrument, step(n), "cpu") for n in SIZES} == {PerExample()}
    broad = opened(
        nn.Sequential(*(nn.Linear(1024, 1024).double() for _ in range(2))),
        torch.randn(2, 256, 1024, dtype=torch.float64),
    )
    assert better_estimator(broad, step(8), "cpu") == Probe()
    assert better_estimator(broad, step(128), "cpu") == PerExample()


@pytest.mark.usefixtures("no_margin")
def test_wide_layers_with_many_positions_and_few_examples_are_sketched() -> None:
    """What is added to a product is more there than what a sketch takes; many examples measured exactly win again."""
    instrument = opened(wide(), floats(4, 48, 256))
    chosen = [better_estimator(instrument, step(n), "cpu") for n in SIZES]
    assert chosen == [Probe()] * 6 + [PerExample()] * 2
    assert better_estimator(instrument, step(4096), "cpu") == PerExample()


def test_few_positions_or_coordinates_are_never_sketched_on_a_cpu() -> None:
    """Products of positions cost less than a sketch there, and coordinates need every gradient."""
    coordinates = Request(coordinates=CoordinateReduction(kind="max"))
    for instrument in (opened(wide(), floats(4, 8, 256)), opened(wide(), floats(4, 48, 256), coordinates)):
        assert {better_estimator(instrument, step(n), "cpu") for n in SIZES} == {PerExample()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("request_", [NORMS, Request(inner_products=True, coordinates=CoordinateReduction(kind="max"))])
def test_the_rule_by_its_formula(device: str, request_: Request) -> None:
    instrument = opened(wide(), floats(4, 48, 256), request_)
    how = NormsBy(inner_products=request_.inner_products, coordinates=request_.coordinates is not None)
    layers = list(instrument.sizes.values())
    for n in SIZES:
        exact = measured_seconds(layers, step(n), device, replace(how, fuse=True))
        probe = measured_seconds(layers, step(n), device, replace(how, probes=4))
        better = MARGIN * probe * (1 + PROBE_VARIANCE["linear"] * n / (4 * SPREAD)) < exact
        assert better_estimator(instrument, step(n), device) == (Probe() if better else PerExample())


def test_the_worst_sketched_layer_says_how_sure_a_probe_is() -> None:
    build, x = USUAL["cnn"]
    instrument = opened(build(), x)
    assert probe_variance(instrument, NormsBy(probes=4)) == PROBE_VARIANCE["convolution"]
    assert probe_variance(opened(wide(), floats(4, 48, 256)), NormsBy(probes=4)) == PROBE_VARIANCE["linear"]
    assert probe_variance(instrument, NormsBy(probes=0)) == 0


@pytest.mark.usefixtures("no_margin")
def test_a_change_takes_over_what_was_learnt() -> None:
    instrument = opened(wide(), floats(4, 48, 256))
    before = instrument.state_dict()
    estimator, other = reconsidered(PerExample(), instrument, step(8), "cpu")
    assert estimator == Probe()
    assert other.state_dict() == before
    assert other.seconds == instrument.seconds
    assert reconsidered(Probe(), other, step(8), "cpu") == (Probe(), other)
    assert reconsidered(Probe(), other, step(4096), "cpu")[0] == PerExample()
    units = MicroBatch().open(instrument.model, NORMS)
    assert reconsidered(MicroBatch(), units, step(8), "cpu") == (MicroBatch(), units)


@pytest.mark.usefixtures("no_margin")
def test_a_meter_reconsiders_before_each_step_and_only_where_it_may() -> None:
    kinds: dict[object, list[str]] = {}
    for estimator in ("auto", PerExample()):
        model, x = wide(), floats(8, 48, 256)
        meter = ada.GradientMeter(model, estimator)
        for _ in range(3):
            model.zero_grad()
            with meter:
                losses_of(model, (x,)).mean().backward()
            kinds.setdefault(repr(estimator), []).append(meter.statistics().kind)
    assert list(kinds.values()) == [["per_example", "probe", "probe"], ["per_example"] * 3]


@pytest.mark.parametrize(("width", "positions", "sketched"), [(1024, 128, range(7, 45)), (2048, 128, range(0))])
def test_where_a_probe_is_chosen_is_as_documented(width: int, positions: int, sketched: range) -> None:
    layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(2)))
    found = opened(layers, floats(2, positions, width))
    assert [n for n in range(1, 200) if better_estimator(found, step(n), "cpu") == Probe()] == list(sketched)
