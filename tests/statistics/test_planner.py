"""When to measure: the modelled average keeps its promise, whatever the steps cost, and repeats exactly."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.statistics import MicroBatch, PerExample
from adadagrad.statistics.base import Request
from adadagrad.statistics.layer_costs import LayerSize, NormsBy
from adadagrad.statistics.planner import MeasureBudget, StepSize, measured_seconds, plain_seconds
from tests.statistics.checking import Composite, floats, losses_of, measure_once

LAYERS = [LayerSize(weights=5000, positions=49, activations=3000), LayerSize(10_000, 1, 1000)]
STEP = StepSize(examples=512, micro_batches=4, measured_examples=128, measured_micro_batches=1)


def costs(seed: int, steps: int = 20_000) -> list[tuple[float, float]]:
    """Plain and measuring cost of each step; some measurements cost far more than their step, others nearly nothing."""
    draw = random.Random(seed)
    return [(10 ** draw.uniform(-4, 0), 10 ** draw.uniform(-5, 1)) for _ in range(steps)]


@pytest.mark.parametrize("overhead", [0.01, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_modelled_average_stays_within_max_overhead(overhead: float, seed: int) -> None:
    """At every moment from the second measurement on; the first is made on credit, and paid back before that."""
    budget = MeasureBudget(overhead)
    plain = spent = 0.0
    measurements = 0
    for step_cost, measuring in costs(seed):
        plain += step_cost
        if budget.due(step_cost, measuring):
            spent += measuring
            measurements += 1
        if measurements > 1:
            assert spent <= overhead * plain * (1 + 1e-9)
    assert measurements > 10


@pytest.mark.parametrize("overhead", [0.01, 0.05, 0.5])
def test_a_steady_run_uses_the_budget_and_not_less(overhead: float) -> None:
    budget = MeasureBudget(overhead)
    measured = sum(budget.due(1.0, 0.8) for _ in range(4000))
    assert measured * 0.8 / 4000 == pytest.approx(overhead, rel=0.05)


def test_a_measurement_that_costs_little_is_made_at_every_step() -> None:
    budget = MeasureBudget(0.05)
    assert all(budget.due(1.0, 0.04) for _ in range(100))


def test_cheap_measurements_hoard_no_credit_for_a_dear_one() -> None:
    budget = MeasureBudget(0.05)
    for _ in range(10_000):
        budget.due(1.0, 0.0)
    assert not budget.due(1.0, 1.0)


def test_the_credit_is_the_whole_state() -> None:
    steps = costs(7, 400)
    whole, first, second = MeasureBudget(0.1), MeasureBudget(0.1), MeasureBudget(0.1)
    decisions = [whole.due(*step) for step in steps]
    resumed = [first.due(*step) for step in steps[:150]]
    second.credit = first.credit
    assert resumed + [second.due(*step) for step in steps[150:]] == decisions


@pytest.mark.parametrize("overhead", [0.0, -1.0, float("nan")])
def test_an_overhead_that_is_none_is_refused(overhead: float) -> None:
    with pytest.raises(InvalidArgument, match="max_overhead"):
        MeasureBudget(overhead)


def test_the_model_grows_with_what_it_counts() -> None:
    for device in ("cpu", "cuda"):
        plain, measured = plain_seconds(LAYERS, STEP, device), measured_seconds(LAYERS, STEP, device)
        assert 0 < measured < (plain if device == "cpu" else 2 * plain)
        more = dataclasses.replace(STEP, examples=1024, measured_examples=256)
        assert plain < plain_seconds(LAYERS, more, device) <= 2 * plain
        assert measured < measured_seconds(LAYERS, more, device) <= 2 * measured
        products = measured_seconds(LAYERS, STEP, device, NormsBy(inner_products=True))
        both = measured_seconds(LAYERS, STEP, device, NormsBy(inner_products=True, coordinates=True))
        assert measured < products < both


def test_the_modelled_seconds_by_hand() -> None:
    """One convolution and one layer without positions: which steps are measured, and so the trace, hangs on these."""
    flops, traffic = 6 * (5000 * 49 + 10_000) * 512, 12 * (3000 + 1000) * 512 + 12 * 15_000
    for device, rates in (("cpu", (1.9e11, 1.5e10, 8e-6)), ("cuda", (3e13, 1.5e12, 8e-6))):
        plain = flops / rates[0] + traffic / rates[1] + (20 + 6 * 2) * 4 * rates[2]
        assert plain_seconds(LAYERS, STEP, device) == pytest.approx(plain, rel=1e-12)
        for inner, coordinates in ((0, 0), (1, 0), (0, 1), (1, 1)):
            product = 2 * 128 * (5000 * 49 * (1 + inner + coordinates) + 10_000 * (inner + coordinates))
            rows = 8 * 128 * 5000 * (1 + coordinates)  # the other layer's coordinates are products of squares
            moved = 4 * (3000 + 1000) * 128 * (1 + inner) + rows + 4 * 15_000
            calls = 120 + 25 * 2 * (1 + inner + coordinates)
            measured = product / rates[0] + moved / rates[1] + calls * rates[2]
            how = NormsBy(inner_products=bool(inner), coordinates=bool(coordinates))
            found = measured_seconds(LAYERS, STEP, device, how)
            assert found == pytest.approx(measured, rel=1e-12)


def test_the_modelled_seconds_in_numbers() -> None:
    """On a CPU, in ms: 783,360,000 flops, 24,756,000 bytes and 128 calls; 62,720,000, 7,228,000 and 170."""
    assert plain_seconds(LAYERS, STEP, "cpu") == pytest.approx(1e-3 * (783.36 / 190 + 24.756 / 15 + 1.024), rel=1e-12)
    assert measured_seconds(LAYERS, STEP, "cpu") == pytest.approx(1e-3 * (62.72 / 190 + 7.228 / 15 + 1.36), rel=1e-12)


@pytest.mark.parametrize("extra", [1, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_cutting_a_step_into_more_micro_batches_costs_by_hand(extra: int, device: str) -> None:
    """Calls of a forward and backward, 16 bytes for each of 15,000 weights, and a tenth of a plain step, each time."""
    byte, call = {"cpu": (1 / 1.5e10, 8e-6), "cuda": (1 / 1.5e12, 8e-6)}[device]
    more = dataclasses.replace(STEP, extra_micro_batches=extra)
    one = (20 + 6 * 2) * call + 16 * 15_000 * byte + plain_seconds(LAYERS, STEP, device) / 10
    added = measured_seconds(LAYERS, more, device) - measured_seconds(LAYERS, STEP, device)
    assert added == pytest.approx(extra * one, rel=1e-9)
    assert plain_seconds(LAYERS, more, device) == plain_seconds(LAYERS, STEP, device)


def test_micro_batches_are_priced_by_what_is_read_of_their_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].bias.requires_grad_(False)
    step = StepSize(examples=64, micro_batches=4, measured_examples=64, measured_micro_batches=4)
    plain, added = MicroBatch().open(model, Request()).costs(step, "cpu")  # 4 units, 3 sums of them, the final one
    assert added == pytest.approx(8 * (4 * (12 + 3 + 6) / 1.5e10 + 2 * 8e-6 * 3), rel=1e-12)
    assert plain == pytest.approx(6 * 21 * 64 / 1.9e11 + 12 * 21 / 1.5e10 + (20 + 6 * 3) * 4 * 8e-6, rel=1e-12)


def test_an_unknown_device_counts_as_an_accelerator() -> None:
    assert plain_seconds(LAYERS, STEP, "xpu") == plain_seconds(LAYERS, STEP, "cuda")


def test_an_instrument_knows_sizes_from_its_trial_runs_and_passes_them_on() -> None:
    build = lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(75, 4)).double()  # noqa: E731
    model = build()
    instrument = PerExample().open(model, Request())
    assert instrument.costs(STEP, "cpu") == pytest.approx((20 * 4 * 8e-6, 120 * 8e-6), rel=1e-12)  # no layer is known
    measure_once(instrument, lambda m: losses_of(m, (floats(6, 1, 5, 5),)))
    expected = [LayerSize(27, 25, 100, formed=27 + 9 * 25 // 2, fused=True), LayerSize(300, 1, 79)]
    assert instrument.costs(STEP, "cpu") == (
        plain_seconds(expected, STEP, "cpu"),
        measured_seconds(expected, STEP, "cpu", NormsBy(fuse=True)),
    )
    other = PerExample().open(build(), Request())
    other.load_state_dict(instrument.state_dict())
    assert other.costs(STEP, "cpu") == instrument.costs(STEP, "cpu")


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_an_instrument_that_takes_over_a_state_repeats_the_other_bitwise() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)).double()
    losses = lambda m: losses_of(m, (floats(6, 4),))  # noqa: E731
    first, second = PerExample().open(model, Request()), PerExample().open(model, Request())
    for _ in range(3):
        measure_once(first, losses)
    assert first.fallback
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        assert measure_once(first, losses) == measure_once(second, losses)
    assert second.state_dict() == first.state_dict()
    assert MicroBatch().open(model, Request()).state_dict() == {}


def test_a_layer_that_is_done_over_costs_a_forward_and_a_backward_more() -> None:
    over = [dataclasses.replace(layer, reruns=1) for layer in LAYERS]
    assert plain_seconds(over, STEP, "cpu") == plain_seconds(LAYERS, STEP, "cpu")
    assert measured_seconds(over, STEP, "cpu") > measured_seconds(LAYERS, STEP, "cpu")
    model = Composite(
        lambda m, x: m.bag(m.gru(x)[0].sum(2).long() % 5),
        gru=nn.GRU(4, 3, batch_first=True),
        bag=nn.EmbeddingBag(5, 2),
    ).double()
    instrument = PerExample().open(model, Request())
    model.gru.requires_grad_(False)
    measure_once(instrument, lambda m: losses_of(m, (floats(6, 5, 4),)))
    (bag,) = [size for (name, _), size in instrument._layout.sizes.items() if name == "bag"]
    assert bag == LayerSize(weights=0, positions=1, activations=7, reruns=1)
    model.gru.requires_grad_(True)
    lstm = PerExample().open(nn.Sequential(nn.Linear(4, 4), Last(nn.GRU(4, 3, batch_first=True))).double(), Request())
    measure_once(lstm, lambda m: losses_of(m, (floats(6, 5, 4),)))
    assert lstm._layout.sizes["1.layer", 0] == LayerSize(weights=63, positions=6, activations=38, reruns=1)


class Last(nn.Module):
    """The outputs of a recurrent layer without its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]
