"""V_j / g_j^2 reduced over coordinates: each reduction by hand, and what zero, NaN and rounding mean."""

from __future__ import annotations

import math

import pytest
import torch

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics import PerExample
from adadagrad.statistics.base import Request
from adadagrad.statistics.coordinate import coordinate_variances, reduce_ratio
from adadagrad.statistics.sums import WeightedSums
from tests.statistics.checking import Composite, floats, losses_of, measure_once

MAX, BLOCKS, WEIGHTED = (CoordinateReduction(kind=kind) for kind in ("max", "blocks", "weighted"))
T = torch.tensor
V = [T([4.0, 9.0]), T([[1.0], [6.0]])]
G = [T([2.0, 1.0]), T([[1.0], [-2.0]])]  # ratios 1, 9, 1, 1.5


def quantile(q: float) -> CoordinateReduction:
    return CoordinateReduction(kind="quantile", quantile=q)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (MAX, 9.0),
        (quantile(1.0), 9.0),
        (quantile(0.75), 1.5),
        (quantile(0.74), 1.5),
        (quantile(0.5), 1.0),
        (quantile(0.0), 1.0),
        (BLOCKS, 13 / 5),
    ],
    ids=str,
)
def test_by_hand(reduction: CoordinateReduction, expected: float) -> None:
    assert reduce_ratio(V, G, reduction) == pytest.approx(expected, rel=1e-15)


def test_weighted_by_hand() -> None:
    """w = 1/sqrt(v): (4/1 + 9/2 + 1/1 + 6/4) / (4/1 + 1/2 + 1/1 + 4/4)."""
    moments = [T([1.0, 4.0]), T([[1.0], [16.0]])]
    assert reduce_ratio(V, G, WEIGHTED, moments) == pytest.approx(11 / 6.5, rel=1e-15)
    moments[1][0, 0] = 0.0  # no step there, so no noise in it either
    assert reduce_ratio(V, G, WEIGHTED, moments) == pytest.approx(10 / 5.5, rel=1e-15)


def test_weighted_without_moments() -> None:
    assert reduce_ratio(V, G, WEIGHTED, [T([1.0, 4.0]), None]) is None
    with pytest.raises(InvalidArgument, match="second moments"):
        reduce_ratio(V, G, WEIGHTED)


@pytest.mark.parametrize("reduction", [MAX, quantile(1.0), BLOCKS], ids=str)
class TestZeros:
    def test_a_coordinate_without_noise_and_signal_says_nothing(self, reduction: CoordinateReduction) -> None:
        dead = [T([0.0, 8.0]), T([0.0])], [T([0.0, 2.0]), T([0.0])]
        assert reduce_ratio(*dead, reduction) == 2.0

    def test_noise_without_signal_is_infinite(self, reduction: CoordinateReduction) -> None:
        assert reduce_ratio([T([1.0]), T([1.0])], [T([0.0]), T([1.0])], reduction) == math.inf

    def test_signal_without_noise_is_zero(self, reduction: CoordinateReduction) -> None:
        assert reduce_ratio([T([0.0])], [T([1.0])], reduction) == 0.0

    def test_nothing_at_all_is_zero(self, reduction: CoordinateReduction) -> None:
        assert reduce_ratio([T([0.0])], [T([0.0])], reduction) == 0.0
        assert reduce_ratio([], [], reduction) == 0.0
        assert reduce_ratio([torch.zeros(0)], [torch.zeros(0)], reduction) == 0.0

    @pytest.mark.parametrize("first", [False, True])
    def test_nan_anywhere_is_nan(self, reduction: CoordinateReduction, first: bool) -> None:
        """Wherever it stands, and also where the gradient itself is NaN: no decision may rest on the others."""
        pairs = [(T([math.nan]), T([1.0])), (T([9.0]), T([1.0]))]
        for pair in (pairs[0], (T([math.nan]), T([math.nan])), (T([1.0]), T([math.nan]))):
            order = [pair, pairs[1]] if first else [pairs[1], pair]
            assert math.isnan(reduce_ratio(*map(list, zip(*order, strict=True)), reduction))

    def test_infinite_noise_is_infinite(self, reduction: CoordinateReduction) -> None:
        assert reduce_ratio([T([math.inf]), T([1.0])], [T([1.0]), T([1.0])], reduction) == math.inf

    def test_nothing_but_rounding_counts_as_zero(self, reduction: CoordinateReduction) -> None:
        """A gradient 1e-8 of the largest in float32 is rounding, and so is its ratio; one 1e-3 of it is not."""
        noise = [T([1.0]), T([1e-12])]
        assert reduce_ratio(noise, [T([1.0]), T([1e-8])], reduction) == 1.0
        assert reduce_ratio([T([1.0]), T([1e-4])], [T([1.0]), T([1e-3])], reduction) == pytest.approx(100)
        double = [g.double() for g in (T([1.0]), T([1e-8]))]
        assert reduce_ratio([v.double() for v in noise], double, reduction) == pytest.approx(1e4)


@pytest.mark.parametrize("reduction", [MAX, quantile(0.5), BLOCKS], ids=str)
def test_the_ratio_does_not_depend_on_the_scale_of_the_loss(reduction: CoordinateReduction) -> None:
    for scale in (1e-20, 1e20):
        scaled = [scale**2 * v.double() for v in V], [scale * g.double() for g in G]
        assert reduce_ratio(*scaled, reduction) == pytest.approx(reduce_ratio(V, G, reduction), rel=1e-12)


def test_the_variance_of_every_coordinate() -> None:
    rows, c = floats(6, 9), torch.tensor([0.3, 0.1, 0.2, 0.1, 0.1, 0.2], dtype=torch.float64)
    g = c @ rows
    sums = WeightedSums()
    sums.add(c, rows.square().sum(1))
    expected = (c[:, None] * (rows - g).square()).sum(0) / (1 - c.square().sum())
    (found,) = coordinate_variances([(c[:, None] * rows.square()).sum(0)], [g], sums)
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


def test_one_example_has_no_variance_in_any_coordinate() -> None:
    sums = WeightedSums()
    sums.add(torch.ones(1).double(), torch.ones(1).double())
    assert coordinate_variances([torch.ones(3)], [torch.ones(3)], sums)[0].isnan().all()


def test_a_gradient_that_is_zero_up_to_rounding_does_not_decide() -> None:
    """The bias of an attention key shifts all scores alike: its own ratio is rounding over rounding."""
    torch.manual_seed(3)
    q, k, o = (torch.nn.Linear(4, 4) for _ in range(3))
    model = Composite(lambda m, x: m.o(torch.softmax(m.q(x) @ m.k(x).mT, -1) @ x), q=q, k=k, o=o).double()
    x = (floats(8, 5, 4),)
    ratios = []
    for trainable in (True, False):
        k.bias.requires_grad_(trainable)
        instrument = PerExample().open(model, Request(coordinates=BLOCKS))
        ratios.append(measure_once(instrument, lambda m: losses_of(m, x))[0].coordinate_ratio)
        if trainable:
            assert k.bias.grad.norm() < 1e-12
        k.bias.grad = None
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-10)
