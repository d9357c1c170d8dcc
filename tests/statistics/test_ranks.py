"""Two ranks that share the examples find the numbers that one process finds."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from adadagrad.core.comm import all_ranks
from adadagrad.core.records import GradientStatistics
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics import MicroBatch, PerExample
from adadagrad.statistics.base import AbstractEstimator, Request
from adadagrad.statistics.coordinate import coordinate_variances, reduce_ratio
from adadagrad.statistics.sums import WeightedSums
from tests.ranks import on_two_ranks
from tests.statistics.checking import floats

EXAMPLES = 11
FIELDS = ("grad_norm_sq", "variance_trace", "inner_product_variance", "coordinate_ratio", "num_examples", "num_units")
REDUCTIONS = (
    CoordinateReduction(kind="max"),
    CoordinateReduction(kind="quantile", quantile=0.6),
    CoordinateReduction(kind="blocks"),
    CoordinateReduction(kind="weighted"),
)


def network() -> nn.Module:
    torch.manual_seed(4)
    layers = [nn.Conv2d(1, 3, 3), nn.GroupNorm(3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 4)]
    return nn.Sequential(*layers).double()


def measure(
    estimator: AbstractEstimator, reduction: CoordinateReduction, micro_batches: list[slice]
) -> GradientStatistics:
    """One step whose examples are these micro-batches here (and others elsewhere); gradients summed by hand."""
    model = network()
    moments = {p: torch.linspace(0.5, 2, p.numel(), dtype=p.dtype).view_as(p) for p in model.parameters()}
    request = Request(inner_products=True, coordinates=reduction, second_moment=moments.get, ranks=all_ranks())
    instrument = estimator.open(model, request)
    x, y = floats(EXAMPLES, 1, 5, 5), torch.arange(EXAMPLES) % 4
    for part in micro_batches:
        with instrument.micro_batch(len(y[part]), 1 / EXAMPLES):
            (nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum") / EXAMPLES).backward()
    if dist.is_initialized():
        for p in model.parameters():
            dist.all_reduce(p.grad)
    return instrument.finish()


SPLITS = ([slice(0, 3), slice(3, 5)], [slice(5, 6), slice(6, 9), slice(9, 11)])
CASES = [(estimator, reduction) for estimator in (PerExample(), MicroBatch()) for reduction in REDUCTIONS]


def of_rank(rank: int) -> tuple[list[dict], float | None]:
    return [asdict(measure(estimator, reduction, SPLITS[rank])) for estimator, reduction in CASES], shares(rank)


@pytest.fixture(scope="module")
def ranks() -> list[tuple[list[dict], float | None]]:
    return on_two_ranks(of_rank)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{e} {r.kind}" for e, r in CASES])
def test_all_numbers_are_those_of_one_process_and_equal_on_both_ranks(number: int, ranks) -> None:
    estimator, reduction = CASES[number]
    expected = asdict(measure(estimator, reduction, [part for rank in SPLITS for part in rank]))
    first, second = ranks[0][0][number], ranks[1][0][number]
    assert first == second
    errors = ["grad_norm_sq_error", *(["variance_trace_error"] if isinstance(estimator, PerExample) else [])]
    for field in (*FIELDS, *errors):
        assert first[field] == pytest.approx(expected[field], rel=1e-10), field
    assert first["variance_trace_error"] > 0  # of units: from the contrasts within the ranks
    assert expected["num_units"] == (EXAMPLES if isinstance(estimator, PerExample) else 5)


def shares(rank: int | None) -> float | None:
    """The reduction over coordinates of rows that lie on one rank or on two."""
    rows = floats(7, 30)
    mine = rows if rank is None else (rows[:2], rows[2:])[rank]
    sums = WeightedSums(ranks=all_ranks())
    sums.add(torch.full((len(mine),), 1 / 7, dtype=torch.float64), mine.square().sum(1))
    q: list[Tensor] = [piece.clone() for piece in (mine.square().sum(0) / 7).split((10, 20))]
    g = rows.mean(0).split((10, 20))
    return reduce_ratio(coordinate_variances(q, g, sums.over_ranks()), g, CoordinateReduction(kind="max"))


def test_the_vector_of_square_sums_is_added_over_ranks(ranks) -> None:
    rows = floats(7, 30)
    expected = float((rows.var(0) / rows.mean(0).square()).max())
    assert shares(None) == pytest.approx(expected, rel=1e-10)
    assert [ranks[0][1], ranks[1][1]] == [pytest.approx(expected, rel=1e-10)] * 2
