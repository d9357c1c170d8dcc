"""`MicroBatch`: unbiased for units of unequal size, all numbers against the units' own gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument, InvalidMeasurement, StepError
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics import MicroBatch, statistics_from_units
from adadagrad.statistics.base import Request
from adadagrad.statistics.coordinate import reduce_ratio
from tests.statistics.checking import BLOCKS, floats, losses_of

EVERYTHING = Request(inner_products=True, coordinates=BLOCKS)
X = floats(12, 4)


def network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def unit_gradients(model: nn.Module, sizes: tuple[int, ...]) -> Tensor:
    parameters = list(model.parameters())
    rows = []
    for part in X[: sum(sizes)].split(sizes):
        found = torch.autograd.grad(losses_of(model, (part,)).mean(), parameters)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def measure(model: nn.Module, sizes: tuple[int, ...], request: Request = EVERYTHING):
    model.zero_grad()
    instrument = MicroBatch().open(model, request)
    total = sum(sizes)
    for part in X[:total].split(sizes):
        with instrument.micro_batch(len(part), 1 / total):
            (losses_of(model, (part,)).sum() / total).backward()
    return instrument.finish(total)


@pytest.mark.parametrize("sizes", [(6, 6), (4, 4, 4), (2, 3, 1), (5, 1, 4, 2)], ids=str)
def test_all_numbers_from_the_units_own_gradients(sizes: tuple[int, ...]) -> None:
    """Also Vp: the gradients that it needs must outlive the accumulation into `.grad`."""
    model = network()
    u = unit_gradients(model, sizes)
    n = torch.tensor(sizes, dtype=torch.float64)[:, None]
    g = (n * u).sum(0) / n.sum()
    p = (u @ g)[:, None]
    freedom = len(sizes) - 1
    variances = (n * (u - g).square()).sum(0) / freedom
    spread = float((n * (p - (n * p).sum() / n.sum()).square()).sum()) / freedom
    blocks = [q.numel() for q in model.parameters()]
    measured = measure(model, sizes)
    assert measured.grad_norm_sq == pytest.approx(float(g.square().sum()), rel=1e-12)
    assert measured.variance_trace == pytest.approx(float(variances.sum()), rel=1e-12)
    assert measured.inner_product_variance == pytest.approx(spread, rel=1e-12)
    assert measured.coordinate_ratio == pytest.approx(
        reduce_ratio(variances.split(blocks), g.split(blocks), BLOCKS), rel=1e-10
    )
    assert (measured.num_examples, measured.num_units, measured.kind) == (sum(sizes), len(sizes), "micro_batch")


def test_equal_units_are_the_definition() -> None:
    model = network()
    expected = statistics_from_units(unit_gradients(model, (3, 3, 3, 3)), unit_size=3)
    measured = measure(model, (3, 3, 3, 3))
    for field in ("num_examples", "grad_norm_sq", "variance_trace", "inner_product_variance", "num_units"):
        assert getattr(measured, field) == pytest.approx(getattr(expected, field), rel=1e-12)
    assert measured.kind == expected.kind


def test_it_is_the_two_batch_noise_scale() -> None:
    """(mean |u_k|^2 - |g|^2) / (1/m - 1/b), for units of m of b examples."""
    model = network()
    u = unit_gradients(model, (3, 3, 3, 3))
    two_batch = float(u.square().sum(1).mean() - u.mean(0).square().sum()) / (1 / 3 - 1 / 12)
    assert measure(model, (3, 3, 3, 3)).variance_trace == pytest.approx(two_batch, rel=1e-12)


def test_unequal_units_are_unbiased_and_equal_weights_would_not_be() -> None:
    """Units of 16, 16, 16 and 3 examples of trace 50: 49.97 against 82.93 (theory 83.01), in 20,000 draws.

    The sums are those of `UnitInstrument`, on gradients drawn rather than differentiated.
    """
    generator = torch.Generator().manual_seed(1)
    n = torch.tensor([16.0, 16, 16, 3], dtype=torch.float64)
    u = torch.randn(20_000, 4, 50, dtype=torch.float64, generator=generator) / n.sqrt()[:, None]
    g = (n[:, None] * u).sum(1, keepdim=True) / n.sum()
    squares = ((n[:, None] * u.square()).sum((1, 2)) - n.sum() * g.square().sum((1, 2))) / 3
    assert float(squares.mean()) == pytest.approx(50, rel=0.005)
    naive = torch.stack([u[k].var(0).sum() * n.mean() for k in range(2000)]).mean()
    theory = 50 * n.mean() * (1 / n).mean()
    assert float(theory) == pytest.approx(83.01, abs=0.01)
    assert float(naive) == pytest.approx(float(theory), rel=0.02)


class Lookup(nn.Module):
    """A model whose gradient is its input: the mean of drawn vectors."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_the_instrument_itself_is_unbiased_for_ragged_units() -> None:
    generator = torch.Generator().manual_seed(2)
    model = Lookup(50)
    values, signal = [], []
    for _ in range(400):
        model.zero_grad()
        instrument = MicroBatch().open(model, Request())
        for n in (16, 16, 16, 3):
            x = torch.randn(n, 50, dtype=torch.float64, generator=generator) + 0.1
            with instrument.micro_batch(n, 1 / 51):
                (model(x).sum() / 51).backward()
        statistics = instrument.finish(51)
        values.append(statistics.variance_trace)
        signal.append(statistics.true_grad_norm_sq)
    assert sum(values) / 400 == pytest.approx(50, rel=0.02)
    assert sum(signal) / 400 == pytest.approx(0.5, abs=0.05)


def test_a_measured_part_of_a_step_gives_the_parts_variance() -> None:
    model = network()
    sizes = (3, 2, 4)
    instrument = MicroBatch().open(model, EVERYTHING)
    for index, part in enumerate(X[:9].split(sizes)):
        loss = losses_of(model, (part,)).sum() / 9
        if index == 2:
            instrument.close_group()
            loss.backward()
        else:
            with instrument.micro_batch(len(part), 1 / 9):
                (losses_of(model, (part,)).sum() / 9).backward()
    measured = instrument.finish(9)
    u = unit_gradients(model, sizes)[:2]
    n = torch.tensor([3.0, 2.0], dtype=torch.float64)[:, None]
    mean = (n * u).sum(0) / 5
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    p = (u @ g)[:, None]
    assert measured.variance_trace == pytest.approx(float((n * (u - mean).square()).sum()), rel=1e-12)
    assert measured.inner_product_variance == pytest.approx(
        float((n * (p - (n * p).sum() / 5).square()).sum()), rel=1e-12
    )
    blocks = [q.numel() for q in model.parameters()]
    ratio = reduce_ratio((n * (u - mean).square()).sum(0).split(blocks), g.split(blocks), BLOCKS)
    assert measured.coordinate_ratio == pytest.approx(ratio, rel=1e-10)


def test_a_later_change_of_scale_is_taken_into_account() -> None:
    """The engine corrects the scale of `.grad` once, before the statistics."""
    model = network()
    expected = measure(model, (2, 3, 1))
    instrument = MicroBatch().open(model, EVERYTHING)
    model.zero_grad()
    for part in X[:6].split((2, 3, 1)):
        with instrument.micro_batch(len(part), 1 / 8):
            (losses_of(model, (part,)).sum() / 8).backward()
    for p in model.parameters():
        p.grad *= 8 / 6
    measured = instrument.finish(6, scale=8 / 6)
    for field in ("grad_norm_sq", "variance_trace", "inner_product_variance", "coordinate_ratio"):
        assert getattr(measured, field) == pytest.approx(getattr(expected, field), rel=1e-10), field


def test_what_it_refuses() -> None:
    model = network()
    instrument = MicroBatch().open(model, Request())
    with pytest.raises(InvalidArgument, match="num_examples"), instrument.micro_batch():
        pass
    with pytest.raises(InvalidMeasurement, match="nothing was measured"):
        instrument.finish()
    with pytest.raises(StepError, match="already"), instrument.micro_batch(3), instrument.micro_batch(3):
        pass
    for backwards in (0, 2):
        with instrument.micro_batch(3, 1 / 3):
            for _ in range(backwards):
                losses_of(model, (X[:3],)).mean().backward()
        with pytest.raises(InvalidMeasurement, match="backward"):
            instrument.finish()
        model.zero_grad()
    with instrument.micro_batch(3, 0.0):
        losses_of(model, (X[:3],)).mean().backward()
    with pytest.raises(InvalidMeasurement, match="weights"):
        instrument.finish()


@pytest.mark.parametrize("kind", ["max", "blocks"])
def test_one_unit_has_no_variance(kind) -> None:
    measured = measure(network(), (4,), Request(inner_products=True, coordinates=CoordinateReduction(kind=kind)))
    assert measured.variance_trace != measured.variance_trace
    assert measured.inner_product_variance != measured.inner_product_variance
    assert measured.coordinate_ratio is None


def test_its_hooks_are_gone_afterwards() -> None:
    model = network()
    measure(model, (2, 2))
    assert all(not p._backward_hooks for p in model.parameters())
