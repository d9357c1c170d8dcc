"""The errors of s, and of V from units: by hand, in the records, and how often they cover the truth."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from adadagrad.statistics import MicroBatch, PerExample
from adadagrad.statistics.base import Request
from adadagrad.statistics.reference import statistics_from_units
from adadagrad.statistics.standard_errors import grad_norm_sq_error, unit_contrasts, unit_variance_error
from tests.oracles import example_gradients
from tests.statistics.checking import floats
from tests.statistics.test_variance_error import LAMBDA, TRACE, D, draw

X = floats(12, 4)
INNER = Request(inner_products=True)
SIZES = (16, 4, 8, 8, 16, 8, 4, 8)
QUANTILE = 1.4398  # of Student's t with 6 degrees of freedom at 0.9


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2].cos()).square().sum(1)


def from_units(rows: Tensor, sizes: tuple[int, ...]) -> tuple[float, float | None]:
    """V and its error from consecutive groups of examples."""
    units = torch.stack([part.mean(0) for part in rows.split(sizes)])
    n = torch.tensor(sizes, dtype=torch.float64)
    means = (n[:, None] * units).cumsum(0) / n.cumsum(0)[:, None]
    norms, mean_norms = units.square().sum(1).tolist(), means.square().sum(1).tolist()
    contrasts = unit_contrasts(sizes, norms, mean_norms)
    return sum(contrasts) / (len(sizes) - 1), unit_variance_error(contrasts, len(sizes))


def test_contrasts_are_those_of_a_running_variance_and_add_up_to_the_numerator() -> None:
    rows, sizes = floats(15, 3), (3, 1, 5, 4, 2)
    units = torch.stack([part.mean(0) for part in rows.split(sizes)])
    n = torch.tensor(sizes, dtype=torch.float64)
    means = (n[:, None] * units).cumsum(0) / n.cumsum(0)[:, None]
    found = unit_contrasts(sizes, units.square().sum(1).tolist(), means.square().sum(1).tolist())
    for k in range(1, 5):
        factor = n[k] * n[:k].sum() / n[: k + 1].sum()
        assert found[k - 1] == pytest.approx(float(factor * (units[k] - means[k - 1]).square().sum()), rel=1e-10)
    assert sum(found) == pytest.approx(float((n[:, None] * (units - means[-1]).square()).sum()), rel=1e-12)


@pytest.mark.parametrize("heavy", [False, True], ids=["gaussian", "heavy"])
@pytest.mark.parametrize("signal", [0.0, 1.0])
def test_units_of_unequal_size_cover_the_trace(signal: float, heavy: bool) -> None:
    """Also where the signal dominates every unit: the contrasts do not see it."""
    generator = torch.Generator().manual_seed(5)
    found = [from_units(draw(sum(SIZES), heavy, generator) + signal, SIZES) for _ in range(1500)]
    values, errors = torch.tensor(found, dtype=torch.float64).T
    assert float(values.mean()) == pytest.approx(TRACE, rel=0.02)
    covered = float(((values - TRACE).abs() <= QUANTILE * errors).double().mean())
    assert covered == pytest.approx(0.79, abs=0.035)
    ratio = float(errors.square().mean().sqrt() / (values - TRACE).square().mean().sqrt())
    assert ratio == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize(("b", "signal"), [(64, 1.0), (256, 0.3)])
def test_the_error_of_s_covers_its_mean(b: int, signal: float) -> None:
    generator = torch.Generator().manual_seed(6)
    mean = D * signal**2 + TRACE / b
    inside = 0
    for _ in range(800):
        statistics = statistics_from_units(draw(b, False, generator) + signal)
        error = grad_norm_sq_error(statistics.inner_product_variance, 1 / b)
        inside += abs(statistics.grad_norm_sq - mean) <= 1.2816 * error
    assert inside / 800 == pytest.approx(0.8, abs=0.045)


def test_where_noise_dominates_the_error_of_s_is_too_large_by_the_root_of_two() -> None:
    """Mean gradient 0: Var s = 2 tr Sigma^2 / b^2, and 4 V_p / b is 4 tr Sigma^2 / b^2 on average."""
    generator, b = torch.Generator().manual_seed(7), 32
    squares, values = [], []
    for _ in range(1500):
        statistics = statistics_from_units(draw(b, False, generator))
        squares.append(grad_norm_sq_error(statistics.inner_product_variance, 1 / b) ** 2)
        values.append(statistics.grad_norm_sq)
    truth = 2 * float(LAMBDA.square().sum()) / b**2
    assert float(torch.tensor(values).var()) == pytest.approx(truth, rel=0.1)
    assert sum(squares) / 1500 == pytest.approx(2 * truth, rel=0.1)


@pytest.mark.parametrize("request_", [Request(), INNER], ids=["norms", "products"])
@pytest.mark.parametrize("part", [12, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_record_of_per_example_holds_what_the_loop_gives(part: int, weighted: bool, request_: Request) -> None:
    """All examples or the first 7 of 12; equal weights, or weights of which two are 0."""
    model = network()
    rows = example_gradients(model, lambda m: losses(m, X))
    model.zero_grad()
    w = torch.tensor([3.0, 1, 0, 2, 2, 1, 5, 1, 0, 2, 4, 3] if weighted else [1.0] * 12, dtype=torch.float64)
    scale = float(12 / w.sum())  # as the engine does: a provisional 1/12, corrected at the end
    c = w / w.sum()
    instrument = PerExample().open(model, request_)
    bounds = (0, 4, part) if part == 7 else (0, 5, 12)
    for low, high in pairwise(bounds):
        with instrument.micro_batch(high - low, w[low:high] / 12):
            (losses(model, X[low:high]) * w[low:high] / 12).sum().backward()
    if part < 12:
        instrument.close_group()
        (losses(model, X[part:]) * w[part:] / 12).sum().backward()
    for p in model.parameters():
        p.grad *= scale
    found = instrument.finish(12, float(c.square().sum()), scale)
    g = c @ rows
    counted = (w != 0) & (torch.arange(12) < part)
    mine, v = rows[counted], w[counted] / w[counted].sum()
    freedom = 1 - float(v.square().sum())
    q = mine.square().sum(1)
    shrunk = 1.0
    if request_.inner_products:
        q = (mine - g).square().sum(1)
        shrunk = 1 - float(c[counted].square().sum() / c[counted].sum())
    spread = float(v @ q.square() - (v @ q).square()) / (freedom * shrunk**2)
    assert found.variance_trace_error == pytest.approx(math.sqrt(spread * (1 - freedom) / freedom), rel=1e-9)
    if request_.inner_products:
        p = mine @ g
        vp = float(v @ (p - v @ p).square()) / freedom
        assert found.grad_norm_sq_error == pytest.approx(math.sqrt(4 * vp * float(c.square().sum())), rel=1e-10)
    else:
        assert found.grad_norm_sq_error is None


@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 5, 1, 4)], ids=str)
@pytest.mark.parametrize("closed", [False, True])
def test_the_record_of_micro_batches_holds_what_the_units_give(sizes: tuple[int, ...], closed: bool) -> None:
    """With everything measured, and where the step goes on with examples that are not."""
    model = network()
    total = sum(sizes) + 3 * closed
    x = floats(20, 4)[:total]
    rows = example_gradients(model, lambda m: losses(m, x))
    model.zero_grad()
    instrument = MicroBatch().open(model, INNER)
    parts = x.split((*sizes, 3) if closed else sizes)
    for part in parts[: len(sizes)]:
        with instrument.micro_batch(len(part), 1 / total):
            (losses(model, part).sum() / total).backward()
    if closed:
        instrument.close_group()
        (losses(model, parts[-1]).sum() / total).backward()
    found = instrument.finish(total)
    value, error = from_units(rows[: sum(sizes)], sizes)
    assert found.variance_trace == pytest.approx(value, rel=1e-10)
    assert found.variance_trace_error == pytest.approx(error, rel=1e-9)
    n = torch.tensor(sizes, dtype=torch.float64)
    p = torch.stack([part.mean(0) for part in rows[: sum(sizes)].split(sizes)]) @ rows.mean(0)
    vp = float(n @ (p - n @ p / n.sum()).square()) / (len(sizes) - 1)
    assert found.inner_product_variance == pytest.approx(vp, rel=1e-10)
    assert found.grad_norm_sq_error == pytest.approx(math.sqrt(4 * vp / total), rel=1e-10)


def test_too_few_units_have_no_error() -> None:
    assert unit_variance_error([], 1) is None
    assert unit_variance_error([3.0], 2) is None
    assert unit_variance_error([3.0, 5.0], 3) == pytest.approx(1.0)  # variance 2, over 2
    assert grad_norm_sq_error(math.nan, 0.1) is None
    assert grad_norm_sq_error(math.inf, 0.1) is None
