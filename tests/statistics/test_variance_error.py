"""The standard error of V: with known Sigma, V plus or minus its error covers tr Sigma as often as it should."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adadagrad.statistics.sums import WeightedSums

D, N, RUNS = 20, 32, 1200
LAMBDA = torch.linspace(0.2, 2, D, dtype=torch.float64)
TRACE = float(LAMBDA.sum())
QUANTILE = 1.3104  # of Student's t with 30 degrees of freedom at 0.9: the two-sided interval covers 0.8
RISING = torch.arange(1.0, N + 1, dtype=torch.float64) / (N * (N + 1) / 2)


def draw(b: int, heavy: bool, generator: torch.Generator) -> Tensor:
    """Rows of covariance diag(LAMBDA): Gaussian, or of Student's t with 10 degrees of freedom."""
    rows = torch.randn(b, D, dtype=torch.float64, generator=generator) * LAMBDA.sqrt()
    if not heavy:
        return rows
    chi = torch.randn(b, 10, dtype=torch.float64, generator=generator).square().sum(1, keepdim=True)
    return rows * (8 / chi).sqrt()


@dataclass
class Found:
    """V and its error over many draws."""

    values: Tensor
    errors: Tensor

    @property
    def coverage(self) -> float:
        return float(((self.values - TRACE).abs() <= QUANTILE * self.errors).double().mean())

    @property
    def ratio(self) -> float:
        """Stated error (its root mean square) over the true one."""
        return float(self.errors.square().mean().sqrt() / (self.values - TRACE).square().mean().sqrt())


def simulate(*, heavy: bool, signal: float, products: bool, b: int = N, c: Tensor | None = None) -> Found:
    """Measure the first N of b examples whose mean gradient is `signal` in every coordinate."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.full((b,), 1 / b, dtype=torch.float64) if c is None else c
    values, errors = [], []
    for _ in range(RUNS):
        rows = draw(b, heavy, generator) + signal
        g, part, counted = weights @ rows, rows[:N], weights[:N]
        sums = WeightedSums()
        sums.add(counted, part.square().sum(1))
        if products:
            sums.products.append((counted, part @ g))
            sums.unit_squares.append(part.square().sum(1))
        values.append(sums.variance_trace(float((counted @ part).square().sum())))
        errors.append(sums.variance_trace_error(float(g @ g) if products else None))
    return Found(torch.tensor(values), torch.tensor(errors))


PARTS = {"all": {}, "a subset": {"b": 4 * N}, "unequal weights": {"c": RISING}}


@pytest.mark.parametrize("products", [False, True], ids=["norms", "products"])
@pytest.mark.parametrize("part", PARTS)
def test_gaussian_noise_is_covered_at_the_nominal_share(part: str, products: bool) -> None:
    """With the products the signal does not matter; without them it must be small."""
    found = simulate(heavy=False, signal=1.0 if products else 0.0, products=products, **PARTS[part])
    assert found.coverage == pytest.approx(0.8, abs=0.035)
    assert found.ratio == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("products", [False, True], ids=["norms", "products"])
@pytest.mark.parametrize("part", PARTS)
def test_heavier_tails_are_covered_nearly_as_often(part: str, products: bool) -> None:
    """Gradients of Student's t with 10 degrees of freedom: |g_i|^2 has four times a Gaussian's variance."""
    found = simulate(heavy=True, signal=1.0 if products else 0.0, products=products, **PARTS[part])
    assert found.coverage == pytest.approx(0.78, abs=0.04)
    assert found.ratio == pytest.approx(1, abs=0.1)


def test_without_the_products_a_signal_makes_the_error_too_large_and_by_how_much() -> None:
    """Var |g_i|^2 = 2 tr Sigma^2 + 4 mu^T Sigma mu: that excess over the first term alone."""
    found = simulate(heavy=False, signal=1.0, products=False)
    expected = math.sqrt(1 + 4 * TRACE / (2 * float(LAMBDA.square().sum())))
    assert found.ratio == pytest.approx(expected, rel=0.06)
    assert found.coverage > 0.9


def test_the_error_with_products_by_hand() -> None:
    """Rows 0, 0, 3 in one dimension: g = 1, |g_i - g|^2 = 1, 1, 4, V = 3."""
    rows, c = torch.tensor([[0.0], [0], [3]], dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)
    sums = WeightedSums(products=[(c, rows[:, 0])], unit_squares=[rows[:, 0].square()])
    sums.add(c, rows[:, 0].square())
    assert sums.variance_trace(1.0) == pytest.approx(3)
    shrunk, freedom, spread = 2 / 3, 2 / 3, 2.0  # spread: mean of squares 6, minus the mean 2 squared
    expected = math.sqrt(spread / (freedom * shrunk**2) / 3 / freedom)
    assert sums.variance_trace_error(1.0) == pytest.approx(expected, rel=1e-12)
    scaled = sums.scaled(5.0)
    assert scaled.variance_trace_error(1.0, scale=0.2) == pytest.approx(expected, rel=1e-12)
    assert sums.variance_trace_error() == pytest.approx(math.sqrt(18 / freedom / 3 / freedom), rel=1e-12)


def test_two_units_have_no_error() -> None:
    sums = WeightedSums()
    sums.add(torch.full((2,), 0.5, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    assert sums.variance_trace_error() is None
