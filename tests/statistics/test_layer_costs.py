"""What a layer call costs by hand: its sizes from shapes, then flops and bytes of each way to come by its norms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from adadagrad.statistics.layer_costs import RATES, Cost, LayerSize, NormsBy, layer_cost
from adadagrad.statistics.layer_sizes import size_of_call

CPU = RATES["cpu"]
N = 16
READ = 4 * 3000


def cost(layer: LayerSize, **how: int) -> Cost:
    return layer_cost(layer, N, NormsBy(**how), CPU)


def frozen(layer: nn.Module) -> nn.Module:
    layer.bias.requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    ("build", "shape", "size"),
    [
        (lambda: nn.Linear(30, 20), (4, 30), LayerSize(600, 1, 50)),
        (lambda: nn.Linear(30, 20), (4, 20, 30), LayerSize(600, 20, 1000, fused=True, probe=50)),
        (lambda: frozen(nn.Linear(30, 20)), (4, 20, 30), LayerSize(600, 20, 1000, probe=50)),
        (
            lambda: nn.Linear(30, 20),
            (4, 2, 3, 30),
            LayerSize(600, 6, 300, products=36 * 50, formed=72, probe=50),
        ),
        (
            lambda: nn.Linear(30, 30),
            (4, 13, 30),
            LayerSize(900, 13, 780, products=169 * 60, formed=338, fused=True, probe=60),
        ),
        (lambda: nn.Conv2d(3, 8, 3), (4, 3, 6, 6), LayerSize(216, 16, 236, formed=216 + 27 * 8, fused=True)),
        (lambda: nn.Conv1d(3, 8, 3), (4, 3, 6), LayerSize(72, 4, 50, fused=True)),
        (
            lambda: nn.Conv2d(8, 6, 3, groups=2),
            (4, 8, 6, 6),
            LayerSize(216, 16, 384, fused=True, probe=78, thin=72),
        ),
        (
            lambda: nn.Conv2d(96, 96, 3, padding=1),
            (4, 96, 4, 4),
            LayerSize(82944, 16, 3072, 0, 36**2 * 96 + 16**2 * (96 + 72), 36**2 + 16**2, False, 96 * 9 + 96, 96 * 9),
        ),
        (lambda: nn.LayerNorm(5), (4, 3, 5), LayerSize(0, 15, 30, fused=True)),
        (lambda: nn.RMSNorm(5), (4, 3, 5), LayerSize(0, 15, 30)),
    ],
    ids=[
        "one position",
        "direct",
        "frozen bias",
        "by positions",
        "by positions, or fused",
        "few channels",
        "conv1d",
        "groups",
        "small map",
        "norm",
        "rms",
    ],
)
def test_sizes_from_shapes(build: Callable[[], nn.Module], shape: tuple[int, ...], size: LayerSize) -> None:
    layer, x = build(), torch.randn(shape)
    assert size_of_call(layer, x, layer(x)) == size
    layer.__dict__["forward"] = layer.forward  # as a measurement leaves it while it looks at the sizes
    assert size_of_call(layer, x, layer(x)) == size


def test_costs_by_hand() -> None:
    layer = LayerSize(5000, 49, 3000, fused=True, probe=150)
    wide = LayerSize(5000, 49, 3000, fused=True, probe=150, thin=100)
    by_positions = LayerSize(5000, 4, 3000, products=400, formed=32, probe=150)
    patches = LayerSize(5000, 49, 3000, formed=7000, fused=True)
    either = LayerSize(5000, 20, 3000, products=60_000, formed=800, fused=True, probe=150)
    once = 4 * 5000
    assert cost(patches, fuse=True) == Cost(0, 8 * 7000 * N + once, 392_000 * N)  # 0.8 * 2 * 5000 * 49
    assert cost(either, fuse=True) == Cost(0, 8 * 5000 * N + once, 160_000 * N)  # 0.8 * 2 * 5000 * 20
    assert cost(either) == Cost(120_000 * N, (READ + 8 * 800) * N + once)
    assert cost(patches) == Cost(2 * 5000 * 49 * N, (READ + 8 * 7000) * N + once)
    assert cost(layer) == Cost(2 * 5000 * 49 * N, (READ + 8 * 5000) * N + once)
    assert cost(layer, fuse=True) == Cost(0, 8 * 5000 * N + once, 392_000 * N)
    assert cost(layer, probes=4) == Cost(2 * 49 * 4 * 150 * N, 1.5 * READ * N + 2 * once)
    assert cost(wide, probes=4) == Cost(2 * 49 * (4 * 50 + 16 * 100) * N, 1.5 * READ * N + 2 * once)
    assert cost(wide, probes=20) == Cost(2 * 49 * 20 * 150 * N, 1.5 * READ * N + 2 * once)
    assert cost(layer, probes=40) == cost(layer)  # 40 * 150 >= 5000: the exact norms are no dearer
    assert cost(by_positions, probes=4) == cost(by_positions) == Cost(800 * N, (READ + 8 * 32) * N + once)


def test_products_and_coordinates_are_paid_beside_norms() -> None:
    """Each takes a product of its own, but coordinates of a fused layer, which forms every product anyway."""
    layer = LayerSize(5000, 49, 3000, fused=True, probe=150)
    product, rows = 490_000 * N, 40_000 * N  # 2 * 5000 * 49, 8 * 5000
    for how in ({}, {"probes": 4}, {"fuse": True}):
        norms = cost(layer, **how)
        again, slower = (0, 392_000 * N) if "fuse" in how else (product, 0)  # 0.8 * 490,000
        assert cost(layer, inner_products=1, **how) == Cost(norms.flops + product, norms.bytes + READ * N, slower)
        assert cost(layer, coordinates=1, **how) == Cost(norms.flops + again, norms.bytes + rows, slower)
        both = Cost(norms.flops + product + again, norms.bytes + READ * N + rows, slower)
        assert cost(layer, inner_products=1, coordinates=1, **how) == both


def test_everything_of_a_fused_layer_in_numbers() -> None:
    """An example: 490,000 flops; bytes twice 40,000 and one read of 12,000; 0.8 times 490,000 for the pieces."""
    layer = LayerSize(5000, 49, 3000, fused=True)
    assert cost(layer, fuse=True, inner_products=1, coordinates=1) == Cost(7_840_000, 1_492_000, 6_272_000)


def test_one_position_forms_nothing() -> None:
    """Norms are one read and no flop, coordinates a product of squares that writes no row an example."""
    layer, once = LayerSize(5000, 1, 150), 20_000
    for fuse in (0, 1):
        assert cost(layer, fuse=fuse) == Cost(0, 600 * N + once)
        assert cost(layer, fuse=fuse, coordinates=1) == Cost(10_000 * N, 600 * N + once)
        assert cost(layer, fuse=fuse, inner_products=1) == Cost(10_000 * N, 1200 * N + once)


def test_seconds_are_flops_and_bytes_over_rates() -> None:
    assert Cost(1.9e11, 3e10).seconds(CPU) == pytest.approx(3.0)
    assert Cost(1.9e11, 3e10, slower=3.8e11).seconds(CPU) == pytest.approx(5.0)
