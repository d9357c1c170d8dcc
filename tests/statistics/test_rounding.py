"""How much rounding the checks forgive: what is more than it is found, also in a small gradient beside a large one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidMeasurement, UncoveredParameter
from adadagrad.statistics.calls import KeptCall, LayerCall
from adadagrad.statistics.coverage import check_rerun, miscounted, tolerance
from adadagrad.statistics.example_step import ExampleStep
from adadagrad.statistics.rules.linear import LinearRule
from adadagrad.statistics.sums import WeightedSums
from tests.statistics.checking import floats

TYPES = {torch.float64: 1.16e-10, torch.float32: 4.11e-4, torch.bfloat16: 0.25, torch.float16: 0.25}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_tolerance_follows_the_coarsest_precision(dtype: torch.dtype) -> None:
    assert tolerance({dtype}) == pytest.approx(TYPES[dtype], rel=0.01)
    assert tolerance({dtype, torch.float64}) == tolerance({dtype})
    assert tolerance(set()) == 0.0


def call_with(size: float, dtype: torch.dtype) -> tuple[KeptCall, nn.Parameter, Tensor]:
    """Return a call whose gradient has about this size, its weight, and the gradient."""
    layer = nn.Linear(4, 3, bias=False).to(dtype)
    x, gy = floats(6, 4).to(dtype), (floats(6, 3) * size).to(dtype)
    call = LayerCall("layer", layer, LinearRule(), {"weight": layer.weight}, (0, 0))
    return KeptCall(call, x, gy, frozenset()), layer.weight, gy.mT @ x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_gradient_that_is_off_by_more_than_rounding_is_miscounted(dtype: torch.dtype) -> None:
    entry, p, gradient = call_with(1.0, dtype)
    for factor in (0.1, 10.0):
        off = gradient * (1 + factor * 4 * tolerance({dtype}))
        assert miscounted([entry], {p: off}) == ({p} if factor > 1 else set())


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_a_small_gradient_is_judged_too_beside_a_large_one(size: float) -> None:
    large, p, gradient = call_with(1.0, torch.float64)
    small, q, little = call_with(size, torch.float64)
    assert miscounted([large, small], {p: gradient, q: little}) == set()
    assert miscounted([large, small], {p: gradient, q: 2 * little}) == {q}


def test_a_gradient_that_is_nothing_but_rounding_is_not_judged() -> None:
    large, p, gradient = call_with(1.0, torch.float64)
    small, q, little = call_with(1e-16, torch.float64)
    assert miscounted([large, small], {p: gradient, q: 2 * little}) == set()


@pytest.mark.parametrize(
    ("error", "size", "refused"),
    [(1e-14, 1.0, False), (1e-8, 1.0, True), (1e-2, 1e-6, True), (1e-2, 1e-9, True), (1.0, 1e-14, False)],
)
def test_a_rerun_that_is_off_by_more_than_rounding_is_refused(error: float, size: float, refused: bool) -> None:
    whole, gradient = floats(50), size * floats(7)
    arguments = {"p": gradient * (1 + error)}, {"p": gradient}, [whole, gradient], {torch.float64}
    if refused:
        with pytest.raises(UncoveredParameter, match=r"^p: "):
            check_rerun(*arguments)
    else:
        check_rerun(*arguments)


def test_what_one_side_alone_has_counts_whole() -> None:
    whole = [floats(50)]
    check_rerun({}, {"p": None}, whole, set())
    check_rerun({}, {"p": 1e-14 * floats(7)}, whole, set())
    for sums, expected in (({"p": floats(7)}, {"p": None}), ({}, {"p": floats(7)})):
        with pytest.raises(UncoveredParameter):
            check_rerun(sums, expected, whole, set())


@pytest.mark.parametrize(("error", "refused"), [(1e-12, False), (1e-8, True), (-1e-8, True)])
def test_inner_products_that_do_not_add_up_are_refused(error: float, refused: bool) -> None:
    p = nn.Parameter(floats(3))
    sums = WeightedSums(products=[(torch.tensor([0.5, 0.5]).double(), torch.tensor([1.0, 1.0]).double())])
    if refused:
        with pytest.raises(InvalidMeasurement, match="add up to"):
            ExampleStep()._check_products(sums, 1 + error, {p: floats(3)})
    else:
        ExampleStep()._check_products(sums, 1 + error, {p: floats(3)})
