"""Sums over ranks: nothing in one process, the sum in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adadagrad.core.comm import ALONE, all_ranks
from adadagrad.core.records import GradientStatistics
from adadagrad.statistics.sums import WeightedSums
from tests.ranks import on_two_ranks


def test_one_process_adds_nothing() -> None:
    x = torch.tensor([1.0, 2.0])
    assert all_ranks() is ALONE
    assert ALONE.add_(x) is x
    assert ALONE.sum(1.5, 2.0) == ALONE.first(1.5, 2.0) == (1.5, 2.0)
    assert ALONE.sum() == ()
    assert ALONE.gather({"a": 1}) == [{"a": 1}]


def of_rank(rank: int) -> Any:
    """What each of two processes does; the statistics of 3 and 5 examples must be those of all 8."""
    ranks = all_ranks(torch.device("cpu"))
    x = torch.arange(3.0) + 10 * rank
    same = ranks.add_(x)
    units = rows()[(slice(0, 3), slice(3, 8))[rank]]
    total = ranks.add_(units.sum(0) / 8)
    sums = WeightedSums(ranks=ranks)
    c = torch.full((len(units),), 1 / 8, dtype=torch.float64)
    sums.add(c, units.square().sum(1))
    sums.products.append((c, units @ total))
    sums.unit_squares.append(units.square().sum(1))
    s = float(total.square().sum())
    whole = sums.over_ranks(s)
    v, vp = whole.variance_trace(float(total.square().sum())), whole.inner_product_variance()
    told = (ranks.sum(1e-17, 1.0, float(rank)), ranks.first(float(rank + 5)), ranks.gather(rank), ranks.sum())
    errors = whole.variance_trace_error(s), whole.products_in_sum()
    return ranks.index, ranks.count, same is x, x.tolist(), told, whole.units, v, vp, errors


def rows() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_two_processes_hold_the_same_sums() -> None:
    found = on_two_ranks(of_rank)
    mean = rows().mean(0)
    truth = GradientStatistics(
        num_examples=8,
        grad_norm_sq=float(mean.square().sum()),
        variance_trace=float(rows().var(0).sum()),
        inner_product_variance=float((rows() @ mean).var()),
    )
    alone = WeightedSums()
    c = torch.full((8,), 1 / 8, dtype=torch.float64)
    alone.add(c, rows().square().sum(1))
    alone.products.append((c, rows() @ mean))
    alone.unit_squares.append(rows().square().sum(1))
    for rank, (number, size, in_place, x, told, count, v, vp, (error, products)) in enumerate(found):
        assert (number, size, in_place) == (rank, 2, True)
        assert x == [10.0, 12.0, 14.0]
        assert told == ((2e-17, 2.0, 1.0), (5.0,), [0, 1], ())
        assert count == 8
        assert v == pytest.approx(truth.variance_trace, rel=1e-12)
        assert vp == pytest.approx(truth.inner_product_variance, rel=1e-12)
        assert error == pytest.approx(alone.variance_trace_error(truth.grad_norm_sq), rel=1e-12)
        assert products == pytest.approx(alone.products_in_sum(), rel=1e-12)
    assert found[0][6:] == found[1][6:]  # bitwise the same on both ranks
