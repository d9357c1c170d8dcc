"""`explain`: the rule of every layer call, what it costs by the model, what share it covers, and what is left over."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.statistics import MicroBatch, PerExample, Probe
from adadagrad.statistics.coverage_table import BROADCAST, RERUN, reason, rows_of
from adadagrad.statistics.layer_costs import RATES, NormsBy, layer_cost
from adadagrad.statistics.planner import MEASURED_CALLS, StepSize, plain_seconds
from tests.statistics.cases import CASES, GPT, FunctionalTie
from tests.statistics.checking import NORMS, Composite, floats, ids, losses_of, measure_once

CNN = (
    lambda: nn.Conv2d(1, 8, 3, padding=1),
    lambda: nn.GroupNorm(2, 8),
    lambda: nn.ReLU(),
    lambda: nn.Conv2d(8, 16, 5),
    lambda: nn.Flatten(),
    lambda: nn.Linear(256, 3),
)


def metered(model: nn.Module, x: Tensor, estimator: object = "auto") -> ada.GradientMeter:
    model = model.double()
    meter = ada.GradientMeter(model, estimator)
    for _ in range(2):
        model.zero_grad()
        with meter:
            losses_of(model, (x,)).mean().backward()
        meter.statistics()
    return meter


def table(text: str) -> dict[str, list[str]]:
    """The cells of every line of the table, by the name of the layer."""
    lines = text.split("\n\n")[1].splitlines()[2:]
    return {cells[0]: cells[1:] for cells in (re.split(r"  +", line.strip()) for line in lines)}


def number(cell: str) -> float:
    digits, _, unit = cell.partition(" ")
    return float(digits) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[unit]


def rules(model: nn.Module, x: Tensor, estimator: object = "auto") -> dict[str, str]:
    return {name: cells[1] for name, cells in table(metered(model, x, estimator).explain()).items()}


def test_an_mlp() -> None:
    meter = metered(nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4)), floats(6, 30))
    text = meter.explain()
    assert text.startswith("PerExample(calibrate=True, fuse=True)\n")
    assert table(text)["0"][:4] == ["Linear", "one position: product of norms", "1", "620"]
    assert table(text)["2"][:4] == ["Linear", "one position: product of norms", "1", "84"]
    assert "100.00% of 704 parameters: one position: product of norms" in text
    assert "rerun" not in text
    assert re.search(r"a step of 6 examples of which 6 are measured costs [\d.]+% more than a plain one", text)


def test_a_cnn_exactly_and_by_a_probe() -> None:
    x = floats(5, 1, 8, 8)
    build = lambda: nn.Sequential(*(layer() for layer in CNN))  # noqa: E731
    assert rules(build(), x, PerExample()) == {
        "0": "fused product",
        "1": "fused sums",
        "3": "fused product",
        "5": "one position: product of norms",
    }
    assert rules(build(), x, PerExample(fuse=False))["3"] == "product by example"
    by_probe = rules(build(), x, Probe(probes=2))
    assert by_probe == {
        "0": "product by example",
        "1": "sums over positions",
        "3": "sketch of 2 probes",
        "5": "one position: product of norms",
    }
    assert rules(build(), x, Probe(probes=1))["3"] == "sketch of 1 probe"
    small = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1), nn.Flatten(), nn.Linear(96 * 16, 2))
    assert rules(small, floats(3, 96, 4, 4), PerExample())["0"] == "Gram of patches"


def test_costs_are_those_of_the_model() -> None:
    model = nn.Sequential(*(layer() for layer in CNN))
    meter = metered(model, floats(5, 1, 8, 8), Probe())
    sizes = [size for _, size in sorted(meter._instrument.sizes.items())]
    step, cpu = StepSize(5, 1, 5, 1), RATES["cpu"]
    cost = layer_cost(sizes[2], 5, NormsBy(probes=4), cpu)
    share = (cost.seconds(cpu) + MEASURED_CALLS * cpu.call) / plain_seconds(sizes, step, "cpu")
    _, _, positions, parameters, flop, traffic, of_step = table(meter.explain())["3"]
    assert (positions, parameters) == ("16", "3,216")
    assert number(flop) == pytest.approx(cost.flops, rel=0.01)
    assert number(traffic) == pytest.approx(cost.bytes, rel=0.01)
    assert of_step == f"{share:.1%}"


def test_a_gpt_with_a_table_of_positions() -> None:
    text = metered(GPT("parameter", vocabulary=13, width=12, length=9), ids(13, 6, 9), PerExample()).explain()
    found = {name: cells[1] for name, cells in table(text).items()}
    assert found == {
        "tokens": "gradients added over 2 calls",
        "norm1": "fused sums",
        "attention.qkv": "fused product",
        "attention.out": "fused product",
        "norm2": "sums over positions",
        "up": "fused product",
        "down": "fused product",
        "head": "gradients added over 2 calls",
        "table": BROADCAST,
    }
    total = 13 * 12 + 24 + 12 * 39 + 12 * 13 + 12 + 12 * 24 + 24 + 24 * 12 + 12 + 9 * 12
    assert f"of {total:,} parameters" in text  # the tied weight counts once
    shares = [float(share) for share in re.findall(r"([\d.]+)% of [\d,]+ parameters", text)]
    assert sum(shares) == pytest.approx(100, abs=0.05)


def test_a_shared_layer_is_counted_where_it_meets_the_examples() -> None:
    assert rules(GPT("row"), ids(11, 6, 5))["table"] == BROADCAST


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_a_parameter_that_the_fallback_counts_is_named_with_the_reason() -> None:
    text = metered(FunctionalTie(), ids(7, 5, 3)).explain()
    assert table(text)["tokens"] == ["Embedding", RERUN, "28"]
    assert "58.33% of 48 parameters: rerun (no rule)" in text
    assert "rerun for tokens.weight: its layers do not account for its whole gradient" in text
    assert "of that 200.0% for rerunning the model" in text
    scaled = Composite(lambda m, x: m.layer(x) * m.gain, layer=nn.Linear(4, 3), gain=nn.Parameter(torch.ones(3)))
    text = metered(scaled, floats(6, 4)).explain()
    assert table(text)["gain"] == ["Parameter", RERUN, "3"]
    assert "rerun for gain: no layer with a rule owns it" in text


@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_a_layer_of_which_a_part_falls_back_shows_both_parts() -> None:
    model = Composite(lambda m, x: m.layer(x).sin() @ m.layer.weight, layer=nn.Linear(4, 3))
    text = metered(model, floats(6, 4)).explain()
    assert table(text)["layer"][3] == "3"
    assert table(text)["layer.weight"] == ["Parameter", RERUN, "12"]
    assert "80.00% of 15 parameters: rerun (no rule)" in text


def test_before_the_first_measurement_it_says_what_is_known() -> None:
    text = ada.GradientMeter(GPT("parameter")).explain()
    assert "positions, sizes and costs come with the first measured step" in text
    assert table(text)["up"] == ["Linear", "a rule", "144"]
    assert table(text)["table"] == ["Parameter", "found at the first step", "40"]
    assert "of a step" not in text


def test_attention_is_one_row_and_a_layer_that_is_not_called_is_said_to_be_so() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = Composite(lambda m, x: m.layer(x), layer=layer, idle=nn.Linear(2, 2))
    found = rules(model, floats(5, 3, 4))
    assert found["layer.self_attn"] == "layer once more, products"
    assert "layer.self_attn.out_proj" not in found
    assert found["idle"] == "not called so far"


def test_micro_batches_have_no_rules() -> None:
    text = ada.GradientMeter(nn.Linear(3, 2), MicroBatch()).explain()
    assert text.splitlines()[0] == "MicroBatch(units=4)"
    assert "no rule for a layer" in text


@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("case", [case for case in CASES if not case.draws], ids=lambda case: case.name)
def test_every_trained_parameter_is_in_a_row_and_every_fallback_has_a_reason(case) -> None:
    torch.manual_seed(3)
    instrument = PerExample().open(case.build().double(), NORMS)
    measure_once(instrument, lambda m: losses_of(m, (case.data(5),)))
    rows = rows_of(instrument)
    named = {name for row in rows for name in row.parameters}
    assert named == {name for name, p in instrument.model.named_parameters() if p.requires_grad}
    by_rerun = {name for row in rows if row.by == RERUN for name in row.parameters}
    assert by_rerun == set(instrument.fallback)
    assert all(reason(instrument, name) for name in by_rerun)


@pytest.mark.parametrize(
    ("measure", "width", "line"),
    [
        (ada.Measure(every=1), 6, "measured at every step: "),
        (ada.Measure(every=4), 6, "measured at one step in 4: "),
        (ada.Measure(every=1, max_examples=2), 6, "measured at every step: "),
        (ada.Measure(max_overhead=1.0), 1200, "max_overhead=1: every step is measured"),
        (ada.Measure(max_overhead=0.01), 6, r"max_overhead=0.01: one step in [\d.]+ is measured"),
    ],
    ids=["every", "fourth", "a part of every", "generous", "tight"],
)
def test_the_engine_says_how_often(measure: ada.Measure, width: int, line: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)).double()
    data = torch.utils.data.TensorDataset(floats(64, width), floats(64, 3))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    engine = ada.AdaptiveBatch(
        model, optimizer, data, ada.NormTest(eta=100.0), global_batch_size=16, total_samples=128, measure=measure
    )
    assert "come with the first measured step" in engine.explain()
    for step in engine:
        step.run(lambda batch: (model(batch[0]) - batch[1]).square().mean())
        step.update()
    text = engine.explain()
    assert re.search(line, text.splitlines()[-1])
    measured = 2 if measure.max_examples == 2 else 16
    assert f"a step of 16 examples of which {measured} are measured" in text


def test_an_engine_that_measures_nothing_says_so() -> None:
    model = nn.Linear(6, 3).double()
    data = torch.utils.data.TensorDataset(floats(64, 6), floats(64, 3))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    engine = ada.AdaptiveBatch(model, optimizer, data, ada.ConstantBatch(16), total_samples=64)
    assert "nothing is measured" in engine.explain()
