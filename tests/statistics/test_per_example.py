"""`PerExample` equals the naive loop over examples, for every layer named and for whole models."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from adadagrad.core.records import GradientStatistics
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics import PerExample
from adadagrad.statistics.base import Request
from tests.oracles import naive_statistics, relative_error
from tests.statistics.cases import CASES as ALL_CASES
from tests.statistics.cases import Case, losses

CASES = [case for case in ALL_CASES if not case.draws]
BLOCKS = CoordinateReduction(kind="blocks")
FIELDS = ("grad_norm_sq", "variance_trace", "inner_product_variance", "coordinate_ratio")


def build(case: Case) -> nn.Module:
    torch.manual_seed(3)
    return case.build().double()


def measure(
    case: Case, n: int, model: nn.Module, request: Request, splits: tuple[int, ...] | None = None
) -> GradientStatistics:
    """Measure twice with one instrument: the first measurement verifies, the second uses what it learnt."""
    instrument = PerExample().open(model, request)
    x = case.data(n)
    for repeat in range(2):
        model.zero_grad()
        start = 0
        warns = pytest.warns(UserWarning, match="rerun") if case.fallback and repeat == 0 else contextlib.nullcontext()
        with warns:
            for size in splits or (n,):
                with instrument.micro_batch(coefficients=1 / n):
                    (losses(model, x[start : start + size], start).sum() / n).backward()
                start += size
        statistics = instrument.finish(num_examples=n)
    return statistics


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("n", [5, 6])
def test_equals_the_loop_over_examples(case: Case, n: int) -> None:
    model = build(case)
    x = case.data(n)
    expected = naive_statistics(model, lambda m: losses(m, x), BLOCKS)
    measured = measure(case, n, model, Request(inner_products=True, coordinates=BLOCKS))
    for field in FIELDS:
        assert relative_error(getattr(measured, field), getattr(expected, field)) < 1e-10, field


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_alone_take_the_prompt_path_and_agree(case: Case) -> None:
    model = build(case)
    x = case.data(5)
    expected = naive_statistics(model, lambda m: losses(m, x))
    measured = measure(case, 5, model, Request())
    assert relative_error(measured.variance_trace, expected.variance_trace) < 1e-10
    assert measured.inner_product_variance is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_split_into_micro_batches_gives_the_same_numbers(case: Case) -> None:
    request = Request(inner_products=True, coordinates=BLOCKS)
    whole = measure(case, 6, build(case), request)
    for splits in ((4, 2), (3, 2, 1), (1, 5)):
        parts = measure(case, 6, build(case), request, splits)
        for field in FIELDS:
            assert relative_error(getattr(parts, field), getattr(whole, field)) < 1e-10, (splits, field)


# In these no gradient vanishes identically (as a key bias's does), so that single coordinates can be compared.
SINGLE = [
    c for c in CASES if c.name in {"linear, sequence, gram", "conv2d, groups, stride, padding", "called twice", "cnn"}
]


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "reduction", [CoordinateReduction(kind="max"), CoordinateReduction(kind="quantile", quantile=0.7)], ids=str
)
def test_single_coordinates_equal_the_loop(case: Case, reduction: CoordinateReduction) -> None:
    model, x = build(case), case.data(6)
    expected = naive_statistics(model, lambda m: losses(m, x), reduction)
    measured = measure(case, 6, model, Request(coordinates=reduction))
    assert relative_error(measured.coordinate_ratio, expected.coordinate_ratio) < 1e-8
