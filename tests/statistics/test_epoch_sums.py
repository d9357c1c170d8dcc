"""Sums over an epoch: equal to the loop over all its examples while the parameters move."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics
from adadagrad.statistics.epoch_sums import EpochSums
from tests.oracles import example_gradients
from tests.statistics.checking import floats, losses_of

SIZES = (6, 3, 8, 5)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def train(
    model: nn.Module, sums: EpochSums, data: Tensor, sizes: tuple[int, ...]
) -> tuple[list[GradientStatistics | None], list[Tensor]]:
    """Train by SGD; return what the sums said after each step, and the per-example gradients of each (b, d)."""
    optimizer, meter = torch.optim.SGD(model.parameters(), lr=0.05), ada.GradientMeter(model, ada.PerExample())
    said, rows = [], []
    for x in data.split(sizes):
        rows.append(example_gradients(model, lambda m, x=x: losses_of(m, (x,))))
        optimizer.zero_grad()
        with meter:
            losses_of(model, (x,)).mean().backward()
        said.append(sums.update(meter.statistics(), model.parameters()))
        optimizer.step()
    return said, rows


def assert_is_the_loop(epoch: GradientStatistics, rows: list[Tensor], tolerance: float = 1e-11) -> None:
    expected = ada.statistics_from_units(torch.cat(rows))
    assert epoch.num_examples == epoch.num_units == expected.num_examples
    for field in ("grad_norm_sq", "variance_trace", "noise_scale", "mean_variance_factor"):
        assert getattr(epoch, field) == pytest.approx(getattr(expected, field), rel=tolerance), field


def test_an_epoch_is_the_loop_over_its_examples_while_the_parameters_move() -> None:
    said, rows = train(network(), EpochSums(sum(SIZES)), floats(sum(SIZES), 4), SIZES)
    assert said[:-1] == [None] * 3
    assert_is_the_loop(said[-1], rows)
    s, v, n = said[-1].grad_norm_sq, said[-1].variance_trace, sum(SIZES)
    everything = torch.cat(rows)
    diversity = float(everything.square().sum() / everything.sum(0).square().sum())
    assert (v * (n - 1) + n * s) / (n**2 * s) == pytest.approx(diversity, rel=1e-11)


def test_the_next_epoch_starts_from_nothing_and_the_last_step_is_not_cut() -> None:
    said, rows = train(network(), EpochSums(10), floats(44, 4), SIZES + SIZES)
    assert [None if x is None else x.num_examples for x in said] == [None, None, 17, None, 11, None, 11, None]
    assert_is_the_loop(said[2], rows[:3])
    assert_is_the_loop(said[4], rows[3:5])
    assert_is_the_loop(said[6], rows[5:7])


def test_resuming_in_the_middle_of_an_epoch_repeats_every_bit() -> None:
    data = floats(22, 4)
    whole, sums = network(), EpochSums(22)
    train(whole, sums, data[:9], SIZES[:2])
    state, model = sums.state_dict(), copy.deepcopy(whole)
    kept = copy.deepcopy(state)
    file = io.BytesIO()
    torch.save(state, file)
    expected = train(whole, sums, data[9:], SIZES[2:])[0][-1]
    for tensor, before in zip(state["gradients"], kept["gradients"], strict=True):
        assert torch.equal(tensor, before)
    file.seek(0)
    for saved in (torch.load(file, weights_only=True), state):  # the state itself undoes what came after it
        resumed = EpochSums(22)
        resumed.load_state_dict(saved)
        assert train(copy.deepcopy(model), resumed, data[9:], SIZES[2:])[0][-1] == expected


@pytest.mark.parametrize(("field", "value"), [("s", math.nan), ("s", math.inf), ("v", math.nan), ("v", -math.inf)])
def test_a_step_that_is_not_finite_is_left_out(field: str, value: float) -> None:
    p, sums = nn.Parameter(torch.zeros(1)), EpochSums(4)
    p.grad = torch.tensor([1.0])
    sums.update(GradientStatistics(num_examples=2, grad_norm_sq=1.0, variance_trace=2.0), [p])
    before = copy.deepcopy(sums.state_dict())
    p.grad = torch.tensor([value])
    numbers = {"s": 1.0, "v": 2.0} | {field: value}
    broken = GradientStatistics(num_examples=2, grad_norm_sq=numbers["s"], variance_trace=numbers["v"])
    assert sums.update(broken, [p]) is None
    assert sums.state_dict() == before
    p.grad = torch.tensor([3.0])
    epoch = sums.update(GradientStatistics(num_examples=2, grad_norm_sq=9.0, variance_trace=2.0), [p])
    assert (epoch.num_examples, epoch.grad_norm_sq) == (4, 4.0)
    assert epoch.variance_trace == pytest.approx(8 / 3, rel=1e-14)  # of 0, 2, 2, 4


def test_unequal_weights_are_those_of_one_batch() -> None:
    """V = (sum c |g_i|^2 - s) / (1 - sum c^2), as for a single step, with c_i b / n over the epoch."""
    generator, p, sums = torch.Generator().manual_seed(9), nn.Parameter(torch.zeros(3).double()), EpochSums(12)
    rows, weights = [], []
    for b in (5, 7):
        g = torch.randn(b, 3, generator=generator, dtype=torch.float64)
        c = torch.rand(b, generator=generator, dtype=torch.float64)
        c /= c.sum()
        p.grad = c @ g
        s, w = float(p.grad.square().sum()), float(c.square().sum())
        v = (float(c @ g.square().sum(1)) - s) / (1 - w)
        step = GradientStatistics(num_examples=b, grad_norm_sq=s, variance_trace=v, weight_sq_sum=w)
        epoch = sums.update(step, [p])
        rows.append(g)
        weights.append(c * b / 12)
    g, c = torch.cat(rows), torch.cat(weights)
    s, w = float((c @ g).square().sum()), float(c.square().sum())
    assert epoch.weight_sq_sum == pytest.approx(w, rel=1e-13)
    assert epoch.grad_norm_sq == pytest.approx(s, rel=1e-13)
    assert epoch.variance_trace == pytest.approx((float(c @ g.square().sum(1)) - s) / (1 - w), rel=1e-12)


def test_parameters_without_a_gradient_add_nothing_and_half_precision_is_added_in_float32() -> None:
    first, second = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(1).double())
    frozen, sums = nn.Parameter(torch.zeros(5), requires_grad=False), EpochSums(600)
    step = GradientStatistics(num_examples=3, grad_norm_sq=2.0, variance_trace=1.0, num_units=2, kind="micro_batch")
    first.grad = torch.ones(2, dtype=torch.bfloat16)
    for k in range(200):
        second.grad = torch.ones(1).double() if k % 2 else None
        epoch = sums.update(step, [frozen, first, second])
        if k < 199:
            types = [None if x is None else x.dtype for x in sums.state_dict()["gradients"]]
            assert types == [None, torch.float32, torch.float64 if k else None]
    assert epoch.grad_norm_sq == 1 + 1 + 0.5**2
    assert (epoch.num_examples, epoch.num_units, epoch.kind) == (600, 400, "micro_batch")
    assert epoch.inner_product_variance is epoch.variance_trace_error is None


def test_float32_is_precise_enough() -> None:
    model, data = network(torch.float32), floats(600, 4).float()
    said, rows = train(model, EpochSums(600), data, (3,) * 200)
    assert_is_the_loop(said[-1], rows, 1e-5)


def test_other_parameters_and_a_data_set_of_one_example_are_refused() -> None:
    p, sums = nn.Parameter(torch.zeros(3)), EpochSums(10)
    p.grad = torch.ones(3)
    step = GradientStatistics(num_examples=2, grad_norm_sq=3.0, variance_trace=2.0)
    sums.update(step, [p])
    other = nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    for parameters in ([other], [p, p], []):
        with pytest.raises(InvalidArgument, match="parameters must be the same ones"):
            sums.update(step, parameters)
    with pytest.raises(InvalidArgument, match="dataset_size must be >= 2, got 1"):
        EpochSums(1)
