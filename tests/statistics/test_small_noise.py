"""Noise far below the mean gradient: V keeps its digits in float32, for every rule, split and measured part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from adadagrad.statistics import GradientMeter, PerExample
from adadagrad.statistics import example_step as example_step_module
from adadagrad.statistics.base import Request
from adadagrad.statistics.example_instrument import ExampleInstrument
from adadagrad.statistics.rules import chunking
from adadagrad.statistics.small_noise import is_small, needs_double
from tests.oracles import naive_statistics, relative_error
from tests.statistics.cases import CASES, Case, losses
from tests.statistics.checking import BLOCKS, EVERYTHING, NORMS, Composite, assert_close, floats, measure_once

LARGE = 65_536


def regression(b: int, noise: float) -> tuple[nn.Module, Tensor, Tensor]:
    """Inputs and targets that differ from their mean by this share of it; float32."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, generator=generator) * (1 + noise * torch.randn(b, 10, generator=generator))
    y = 3.0 + noise * torch.randn(b, 2, generator=generator)
    torch.manual_seed(2)
    return nn.Linear(10, 2), x, y


def in_float64(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """V and s of the squared error from gradients r x^T and r in float64."""
    r = 2 * (x.double() @ layer.weight.double().T + layer.bias.double() - y.double())
    rows = torch.cat([torch.einsum("np,nd->npd", r, x.double()).flatten(1), r], 1).detach()
    return float(rows.var(0).sum()), float(rows.mean(0).square().sum())


@pytest.mark.parametrize("noise", [1e-4, 1e-3])
@pytest.mark.parametrize("micro_batches", [1, 16])
def test_a_batch_of_65536_with_noise_of_a_ten_thousandth_of_the_mean(micro_batches: int, noise: float) -> None:
    """V is 1e-8 of s; s itself is that of the trained float32 gradient, which is off by 2e-4 here."""
    layer, x, y = regression(LARGE, noise)
    variance, norm_sq = in_float64(layer, x, y)
    assert 0.5 < variance / norm_sq / noise**2 < 3
    meter = GradientMeter(layer, PerExample())
    for _ in range(4):  # the fourth verifies nothing
        layer.zero_grad()
        for part in torch.arange(LARGE).chunk(micro_batches):
            with meter.micro_batch(len(part), 1 / LARGE):
                ((layer(x[part]) - y[part]).square().sum() / LARGE).backward()
        statistics = meter.statistics()
        assert relative_error(statistics.variance_trace, variance) < 1e-5
        assert relative_error(statistics.grad_norm_sq, norm_sq) < 1e-3


def deep(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(m.norm(m.layer(x)))
    h = m.convolution(h.transpose(1, 2)).transpose(1, 2).relu()
    return m.head(m.layer(m.recurrent(h)[0])).mean(1)


def network() -> nn.Module:
    """Products over positions, a layer used twice, a convolution, a layer that is seen whole."""
    torch.manual_seed(2)
    parts = {
        "layer": nn.Linear(6, 6),
        "norm": nn.LayerNorm(6),
        "convolution": nn.Conv1d(6, 6, 3),
        "recurrent": nn.GRU(6, 6, batch_first=True),
        "head": nn.Linear(6, 2),
    }
    return Composite(deep, **parts)


@pytest.mark.parametrize("noise", [1e-4, 1e-2])
@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
def test_layers_of_every_kind(request_: Request, noise: float) -> None:
    """What is left is the rounding of inputs and output gradients, 1e-7 of them or more for deep networks."""
    x = (floats(7, 6) * (1 + noise * floats(96, 7, 6))).float()
    model = network()
    loss = lambda m, x: (m(x) - 3).square().sum(1)  # noqa: E731
    expected = naive_statistics(copy.deepcopy(model).double(), lambda m: loss(m, x.double()), BLOCKS)
    assert expected.variance_trace / expected.grad_norm_sq < 1e-3
    instrument = PerExample().open(model, request_)
    for _ in range(4):
        statistics, _ = measure_once(instrument, lambda m: loss(m, x))
        assert relative_error(statistics.variance_trace, expected.variance_trace) < 1e-3
        if request_ is EVERYTHING and noise == 1e-2:  # coordinates keep the rounding of float32
            assert relative_error(statistics.inner_product_variance, expected.inner_product_variance) < 1e-2
            assert relative_error(statistics.coordinate_ratio, expected.coordinate_ratio) < 0.1


@pytest.mark.parametrize("few", [False, True], ids=["together", "one at a time"])
@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.draws], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:.*no rule counts")
def test_every_rule_adds_its_gradients_up_exactly(
    case: Case, request_: Request, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the noise were small, in float64: sums and norms evaluated again are the loop's."""
    monkeypatch.setattr(example_step_module, "needs_double", lambda *_: True)
    if few:
        monkeypatch.setattr(chunking, "CHUNK_BYTES", 1)
    torch.manual_seed(3)
    model, x = case.build().double(), case.data(5)
    instrument = PerExample().open(model, request_)
    expected = naive_statistics(model, lambda m: losses(m, x), BLOCKS)
    statistics, _ = measure_once(instrument, lambda m: losses(m, x))
    assert_close(statistics, expected)


def measured(instrument: ExampleInstrument, x: Tensor, y: Tensor, sizes: tuple[int, ...], part: int) -> float:
    """V of a step whose first `part` micro-batches are measured."""
    instrument.model.zero_grad()
    n, start = sum(sizes), 0

    def loss(a: int, k: int) -> Tensor:
        return (instrument.model(x[a : a + k]) - y[a : a + k]).square().sum() / n

    for number, size in enumerate(sizes):
        if number < part:
            with instrument.micro_batch(size, 1 / n):
                loss(start, size).backward()
        else:
            loss(start, size).backward()
        start += size
        if number + 1 == part < len(sizes):
            instrument.close_group()
    return instrument.finish(n).variance_trace


def test_a_measured_part() -> None:
    layer, x, y = regression(300, 1e-4)
    instrument = PerExample().open(layer, NORMS)
    expected, _ = in_float64(layer, x[:200], y[:200])
    for _ in range(4):
        assert relative_error(measured(instrument, x, y, (120, 80, 100), 2), expected) < 1e-4


def test_a_change_of_scale_and_weights_of_zero() -> None:
    """The gradient is multiplied after the backward; rows of weight 0 are no examples."""
    layer, x, y = regression(200, 1e-4)
    expected, _ = in_float64(layer, x[:150], y[:150])
    weights = torch.cat([torch.full((150,), 1 / 64), torch.zeros(50)])
    instrument = PerExample().open(layer, EVERYTHING)
    for _ in range(4):
        layer.zero_grad()
        with instrument.micro_batch(200, weights):
            (weights * (layer(x) - y).square().sum(1)).sum().backward()
        for p in layer.parameters():
            p.grad *= 64 / 150
        assert relative_error(instrument.finish(scale=64 / 150).variance_trace, expected) < 1e-4


def test_noise_that_grows_small_later_is_resolved_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    exact = example_step_module.in_double
    monkeypatch.setattr(example_step_module, "in_double", lambda *args: calls.append(1) or exact(*args))
    layer, x, y = regression(512, 1e-4)
    _, wide, goal = regression(512, 1.0)
    instrument = PerExample().open(layer, NORMS)
    counts = []
    for step in range(10):
        noisy = step < 5 or step > 7
        measured(instrument, wide if noisy else x, goal if noisy else y, (512,), 1)
        counts.append(len(calls))
        other = PerExample().open(layer, NORMS)
        other.load_state_dict(instrument.state_dict())
        assert other.state_dict() == instrument.state_dict()
    assert counts == [0, 0, 0, 0, 0, 0, 1, 2, 2, 2]


def test_when_the_noise_is_small() -> None:
    c, gradients = torch.full((4,), 0.25, dtype=torch.float64), [torch.ones(4)]
    for noise, small in ((1e-4, True), (1e-2, False)):
        assert needs_double(c, (4 * (1 + noise)) * c.square(), gradients) == small
        assert is_small(4 * noise, 4.0) == small
    assert needs_double(c, 3.9 * c.square(), gradients)  # below zero: nothing but rounding
    assert not needs_double(c, 4 * c.square(), [g.double() for g in gradients])
    assert not needs_double(c[:1], 4 * c[:1].square(), gradients)
    assert not needs_double(c, torch.full((4,), torch.nan, dtype=torch.float64), gradients)
    assert not is_small(float("nan"), 1.0)


def test_single_examples_go_by_the_last_step() -> None:
    """One example alone has no noise, so micro-batches of one are evaluated in float64 where the last step says so."""
    layer, x, y = regression(24, 1e-4)
    instrument = PerExample().open(layer, NORMS)
    found = [measured(instrument, x, y, (1,) * 24, 24) for _ in range(4)]
    assert (
        relative_error(found[-1], in_float64(layer, x, y)[0]) < 2e-4
    )  # 1.0001e-4 on one processor: other kernels round otherwise


def test_nothing_is_kept_for_it_where_float64_would_say_no_more() -> None:
    layer, x, y = regression(24, 1e-4)
    instrument = PerExample().open(layer.double(), NORMS)
    measured(instrument, x.double(), y.double(), (24,), 1)
    assert not instrument.state_dict()["small_noise"]


@pytest.mark.parametrize("part", [False, True])
def test_products_with_the_gradient_and_what_follows_from_them(part: bool) -> None:
    """Vp, and the errors of V and |g|^2, which are made of differences of them."""
    layer, x, y = regression(60, 1e-5)
    found = []
    for model, inputs, goals in ((layer, x, y), (copy.deepcopy(layer).double(), x.double(), y.double())):
        instrument = PerExample().open(model, Request(inner_products=True))
        for _ in range(4):
            model.zero_grad()
            with instrument.micro_batch(40, 1 / 60):
                ((model(inputs[:40]) - goals[:40]).square().sum() / 60).backward()
            if part:
                instrument.close_group()
                ((model(inputs[40:]) - goals[40:]).square().sum() / 60).backward()
            else:
                for p in model.parameters():
                    p.grad *= 1.5
            statistics = instrument.finish(60 if part else 40, scale=1.0 if part else 1.5)
        found.append(statistics)
    single, double = found
    for field in ("variance_trace", "inner_product_variance", "variance_trace_error", "grad_norm_sq_error"):
        assert relative_error(getattr(single, field), getattr(double, field)) < 1e-2, field
