"""The closed forms over sums, against weighted sample variances written out."""

from __future__ import annotations

import math

import pytest
import torch

from adadagrad.statistics.reference import statistics_from_units
from adadagrad.statistics.sums import WeightedSums


def gathered(rows: torch.Tensor, c: torch.Tensor, splits: tuple[int, ...]) -> WeightedSums:
    sums = WeightedSums()
    g = c @ rows
    for part, weights in zip(rows.split(splits), c.split(splits), strict=True):
        counted = weights != 0
        sums.add(weights[counted], part.square().sum(1)[counted])
        sums.products.append((weights[counted], (part @ g)[counted]))
    return sums


def draw(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize("splits", [(8,), (3, 5), (1,) * 8], ids=str)
def test_equal_weights_are_the_definition_for_any_split(splits: tuple[int, ...]) -> None:
    rows = draw(8)
    sums = gathered(rows, torch.full((8,), 1 / 8, dtype=torch.float64), splits)
    expected = statistics_from_units(rows)
    assert sums.variance_trace(expected.grad_norm_sq) == pytest.approx(expected.variance_trace, rel=1e-12)
    assert sums.inner_product_variance() == pytest.approx(expected.inner_product_variance, rel=1e-12)
    assert sums.freedom == pytest.approx(7 / 8, rel=1e-12)
    assert sums.units == 8


def test_a_part_of_a_step_has_weights_that_add_up_to_less_than_one() -> None:
    """V of the part, from |G|^2 of its own summed gradient, is its plain sample variance."""
    rows = draw(5)
    c = torch.full((5,), 1 / 40, dtype=torch.float64)
    total = c @ rows
    expected = statistics_from_units(rows).variance_trace
    assert gathered(rows, c, (5,)).variance_trace(float(total @ total)) == pytest.approx(expected, rel=1e-12)


def test_unequal_weights_are_unbiased() -> None:
    """V = (sum c |g_i|^2 - |g|^2) / (1 - sum c^2) has mean 9 for 9 unit variances, whatever the weights."""
    c = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    rows = torch.randn(20_000, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = torch.einsum("i,kij->kj", c, rows)
    values = [
        WeightedSums(1.0, float(c.square().sum()), float(squares), 0.0, 4).variance_trace(float(norm))
        for squares, norm in zip(
            torch.einsum("i,kij->k", c, rows.square())[:4000], g.square().sum(1)[:4000], strict=True
        )
    ]
    assert sum(values) / len(values) == pytest.approx(9, rel=0.01)


def test_scaling_the_weights_changes_no_variance() -> None:
    rows, c = draw(6), torch.tensor([1.0, 2, 3, 4, 5, 0], dtype=torch.float64) / 15
    sums = gathered(rows, c, (6,))
    g = c @ rows
    scaled = sums.scaled(0.25)
    assert scaled.variance_trace(float(g @ g) / 16) == pytest.approx(sums.variance_trace(float(g @ g)), rel=1e-12)
    assert scaled.inner_product_variance() == pytest.approx(sums.inner_product_variance(), rel=1e-12)
    assert scaled.variance_trace_error() == pytest.approx(sums.variance_trace_error(), rel=1e-12)
    assert (scaled.units, scaled.weight) == (5, 0.25)


def test_inner_products_do_not_cancel() -> None:
    """Products around 1e8 whose spread is 1: a difference of squares would lose every digit."""
    p = 1e8 + torch.tensor([0.0, 1, 2, 3], dtype=torch.float64)
    c = torch.full((4,), 0.25, dtype=torch.float64)
    sums = WeightedSums(products=[(c, p)])
    sums.add(c, torch.ones(4, dtype=torch.float64))
    assert sums.inner_product_variance() == pytest.approx(5 / 3, rel=1e-9)


def test_too_few_units_say_nothing() -> None:
    one = WeightedSums()
    one.add(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert math.isnan(one.variance_trace(1.0))
    assert math.isnan(one.inner_product_variance())
    assert one.variance_trace_error() is None
    assert math.isnan(WeightedSums().variance_trace(0.0))


def test_rounding_below_zero_is_zero_and_nan_stays() -> None:
    sums = WeightedSums(1.0, 0.5, 1.0, 1.0, 2)
    assert sums.variance_trace(1.0 + 1e-15) == 0.0
    assert math.isnan(sums.variance_trace(math.nan))


def test_the_standard_error_is_that_of_a_mean_of_squared_norms() -> None:
    """Gaussian noise of d = 200: the spread of V over 400 batches of 16 agrees with the error that each states."""
    generator = torch.Generator().manual_seed(2)
    c = torch.full((16,), 1 / 16, dtype=torch.float64)
    values, errors = [], []
    for _ in range(400):
        rows = torch.randn(16, 200, dtype=torch.float64, generator=generator)
        sums = gathered(rows, c, (16,))
        g = c @ rows
        values.append(sums.variance_trace(float(g @ g)))
        errors.append(sums.variance_trace_error())
    assert float(torch.tensor(values).std()) == pytest.approx(sum(errors) / 400, rel=0.15)


@pytest.mark.parametrize("c", [0.25, 3.0, 0.0])
def test_one_weight_for_all_gives_what_as_many_equal_ones_give(c: float) -> None:
    squares = draw(7).square().sum(1)
    short, long = WeightedSums(), WeightedSums()
    for part in squares.split(4):
        short.add_equal(c, c**2 * part)
        long.add_squares(torch.full_like(part, c), c**2 * part)
    for name in ("weight", "weight_sq", "squares", "squares_sq", "units"):
        assert getattr(short, name) == pytest.approx(getattr(long, name), rel=1e-12)
    assert short.units == (7 if c else 0)
