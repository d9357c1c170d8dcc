"""The definition itself, against numbers worked out by hand and the identities between the four numbers."""

from __future__ import annotations

import math

import pytest
import torch

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics import statistics_from_units

ROWS = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])


def test_three_gradients_by_hand() -> None:
    """g = (2, 1); deviations (-1, -1), (1, -1), (0, 2); products 2, 6, 7 around s = 5."""
    statistics = statistics_from_units(ROWS)
    assert statistics.grad_norm_sq == 5.0
    assert statistics.variance_trace == (2 + 2 + 4) / 2
    assert statistics.inner_product_variance == (9 + 1 + 4) / 2
    assert statistics.orthogonal_variance == pytest.approx(4 - 7 / 5)
    assert statistics.true_grad_norm_sq == pytest.approx(5 - 4 / 3)
    assert (statistics.num_examples, statistics.num_units, statistics.kind) == (3, 3, "per_example")


def test_units_of_several_examples_by_hand() -> None:
    """The mean of m examples has an m-th of their variance, so V and Vp are m times those of the rows."""
    statistics = statistics_from_units(ROWS, unit_size=4)
    assert statistics.grad_norm_sq == 5.0
    assert statistics.variance_trace == 16.0
    assert statistics.inner_product_variance == 28.0
    assert (statistics.num_examples, statistics.num_units, statistics.kind) == (12, 3, "micro_batch")
    assert statistics.true_grad_norm_sq == pytest.approx(5 - 16 / 12)


def test_coordinates_by_hand() -> None:
    """V_j = 1, 3 and g_j^2 = 4, 1."""
    by = lambda **kind: statistics_from_units(ROWS, coordinates=CoordinateReduction(**kind)).coordinate_ratio  # noqa: E731
    assert by(kind="max") == 3.0
    assert by(kind="quantile", quantile=0.5) == 0.25
    assert by(kind="blocks") == 4 / 5


def test_identities_on_random_gradients() -> None:
    """Spec 1.3 and D2 on a 37 x 211 matrix, every variance straight from its own definition."""
    rows = torch.randn(37, 211, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.2
    g = rows.mean(0)
    s, p = float(g @ g), rows @ g
    orthogonal = rows - (p / s)[:, None] * g
    statistics = statistics_from_units(rows)
    close = lambda value, rel=1e-13: pytest.approx(value, rel=rel)  # noqa: E731
    assert statistics.grad_norm_sq == close(s)
    assert statistics.variance_trace == close(float(rows.var(0).sum()))
    assert statistics.variance_trace == close((float(rows.square().sum()) - 37 * s) / 36, 1e-12)
    assert statistics.inner_product_variance == close(float(p.var()))
    assert statistics.inner_product_variance == close((float(p.square().sum()) - 37 * s * s) / 36, 1e-12)
    assert statistics.orthogonal_variance == close(float(orthogonal.var(0).sum()))
    assert float(p.sum()) == close(37 * s)
    assert orthogonal.mean(0).abs().max() < 1e-15


def test_half_precision_rows_are_summed_in_double() -> None:
    rows = torch.full((2000, 1), 1.0, dtype=torch.float16)
    rows[::2] = 1.001
    expected = rows.double()
    assert statistics_from_units(rows).variance_trace == float(expected.var(0).sum())


def test_one_unit_has_no_variance() -> None:
    statistics = statistics_from_units(ROWS[:1])
    assert statistics.grad_norm_sq == 1.0
    assert math.isnan(statistics.variance_trace)
    assert math.isnan(statistics.inner_product_variance)


@pytest.mark.parametrize("units", [torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, 2)])
def test_shapes_that_are_no_rows_are_refused(units: torch.Tensor) -> None:
    with pytest.raises(InvalidArgument, match="units must be a matrix"):
        statistics_from_units(units)


def test_a_list_of_rows_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidArgument, match=r"units must be a tensor \(n, d\), got list: torch.stack"):
        statistics_from_units([torch.ones(3)])


def test_a_unit_holds_at_least_one_example() -> None:
    with pytest.raises(InvalidArgument, match="unit_size"):
        statistics_from_units(ROWS, unit_size=0)
