"""Which Linear layers are fused: not with so few positions that products of positions cost less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adadagrad.statistics import PerExample
from adadagrad.statistics.base import Request
from adadagrad.statistics.rules import fused_linear
from adadagrad.statistics.rules.fused_linear import FusedLinear, gram_costs_less
from tests.oracles import naive_statistics
from tests.statistics.checking import BLOCKS, EVERYTHING, NORMS, assert_close, floats, losses_of, measure_once


@pytest.mark.parametrize(
    ("sizes", "gram"),
    [((32, 512, 512), True), ((8, 128, 128), True), ((128, 192, 576), False), ((128, 192, 192), False)],
)
def test_timed_cases(sizes: tuple[int, int, int], gram: bool) -> None:
    assert gram_costs_less(*sizes) == gram
    positions, d, p = sizes
    assert gram_costs_less(positions, p, d) == gram


@pytest.mark.parametrize("widths", [(64, 64), (192, 576), (768, 768), (4096, 8), (100, 4)])
def test_from_some_number_of_positions_on_it_is_fused(widths: tuple[int, int]) -> None:
    chosen = [gram_costs_less(positions, *widths) for positions in range(1, 400)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0]
    assert not chosen[-1]


def test_the_crossing_by_hand() -> None:
    """d = p = 100: three times 608 T^2 against 1,040,000 + 5000 T: 1,140,000 and 1,165,000 at 25, the reverse at 26."""
    assert [gram_costs_less(positions, 100, 100) for positions in (25, 26)] == [True, False]


def test_never_where_the_ordinary_rule_forms_the_products_too() -> None:
    """T (p + d) >= p d: 4 * 104 >= 400, though three times 3328 + 3328 is less than 41,600 + 800."""
    assert not gram_costs_less(4, 100, 4)
    assert gram_costs_less(3, 100, 4)


def test_positions_are_all_dimensions_in_between_and_few_are_fused_for_coordinates_alone() -> None:
    rule, layer = FusedLinear(), nn.Linear(100, 100)
    for shape, suits in (((2, 25, 100), False), ((2, 26, 100), True), ((2, 5, 5, 100), False), ((2, 2, 13, 100), True)):
        assert rule.suits(layer, torch.empty(shape)) == suits
        assert rule.can(layer, torch.empty(shape))
    assert not rule.suits(layer, torch.empty(2, 100))
    assert not rule.can(layer, torch.empty(2, 100))
    assert not rule.suits(layer, torch.empty(0, 25, 100))


@pytest.mark.parametrize(
    ("request_", "fused"),
    [(NORMS, 0), (Request(inner_products=True), 0), (EVERYTHING, 1)],
    ids=["norms", "inner products", "coordinates"],
)
def test_few_positions_are_measured_right(request_: Request, fused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the fourth measured step, the first that may be fused; unfused, the gradient keeps every bit."""
    calls, backward = [], FusedLinear.backward

    def watched(self: FusedLinear, *args: object, **kwargs: object) -> object:
        calls.append(args)
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(fused_linear.FusedLinear, "backward", watched)
    torch.manual_seed(5)
    model, x = nn.Sequential(nn.Linear(40, 30), nn.Tanh()).double(), floats(6, 3, 40)

    def losses(m: nn.Module) -> Tensor:
        return losses_of(m, (x,))

    instrument = PerExample().open(model, request_)
    for _ in range(4):
        statistics = measure_once(instrument, losses)[0]
    assert len(calls) == fused
    trained = [p.grad.clone() for p in model.parameters()]
    assert_close(statistics, naive_statistics(model, losses, BLOCKS))
    model.zero_grad()
    losses(model).mean().backward()
    for mine, p in zip(trained, model.parameters(), strict=True):
        assert torch.equal(mine, p.grad) or (fused and float((mine - p.grad).norm() / p.grad.norm()) < 1e-12)
