"""How far the numbers can be trusted in float32 and below."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adadagrad.statistics import GradientMeter, PerExample
from adadagrad.statistics.calls import KeptCall, LayerCall
from adadagrad.statistics.rules import find_rule
from adadagrad.statistics.rules.per_example_sums import squares_per_example
from tests.oracles import naive_statistics, relative_error
from tests.statistics.checking import floats

FIELDS = ("grad_norm_sq", "variance_trace", "inner_product_variance")


def test_float32_agrees_with_float64_on_a_cnn_of_512_examples() -> None:
    """Measured 1e-5 for s and 1e-7 for V; V is a difference of large numbers and needs its norms summed with care."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5, padding=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 7 * 7, 10))
    x, y = torch.rand(512, 1, 28, 28), torch.randint(0, 10, (512,))
    found = []
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(model).to(dtype)
        meter = GradientMeter(twin, PerExample(), inner_products=True)
        with meter:
            nn.functional.cross_entropy(twin(x.to(dtype)), y).backward()
        found.append(meter.statistics())
    for field in FIELDS:
        assert relative_error(getattr(found[0], field), getattr(found[1], field)) < 1e-4, field


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 3, 16])
def test_models_in_half_precision(dtype: torch.dtype, positions: int) -> None:
    """Products of small gradients underflow in float16 (the Gram form's at 3 positions), so they are not made there."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.LayerNorm(30), nn.Linear(30, 20)).to(dtype)
    x = torch.randn(64, positions, 40).to(dtype)
    losses = lambda m, x: 1e-2 * m(x).float().square().flatten(1).mean(1)  # noqa: E731
    twin = copy.deepcopy(model).double()
    expected = naive_statistics(twin, lambda m: 1e-2 * m(x.double()).square().flatten(1).mean(1))
    meter = GradientMeter(model, PerExample(), inner_products=True)
    for _ in range(2):
        model.zero_grad()
        with meter:
            losses(model, x).mean().backward()
        statistics = meter.statistics()
        for field in FIELDS[1:]:
            assert relative_error(getattr(statistics, field), getattr(expected, field)) < 0.03, field


@pytest.mark.parametrize("scale", [1e-5, 1e-3])
def test_tiny_float16_gradients_have_norms_and_products(scale: float) -> None:
    """Gradients of 1e-5 are whole in float16, their products of 1e-10 are not."""
    torch.manual_seed(1)
    layer = nn.Linear(40, 30)
    x, gy = torch.randn(8, 3, 40).half(), (scale * torch.randn(8, 3, 30)).half()
    rule = find_rule(layer)
    rows = torch.einsum("ntp,ntd->npd", gy.double(), x.double())
    direction = torch.randn(30, 40).half()
    squares = rule.square_norms(layer, x, gy, {"weight"})
    products = rule.inner_products(layer, x, gy, {"weight": direction})
    assert torch.allclose(squares, rows.square().sum((1, 2)), rtol=1e-3)
    expected = (rows * direction.double()).sum((1, 2))
    assert (products - expected).abs().max() < 2e-3 * expected.abs().max()


def test_a_direction_too_small_for_float16_keeps_its_inner_products() -> None:
    """The mean gradient of a float16 model under autocast is float32 and may be below float16's least number."""
    torch.manual_seed(1)
    layer = nn.Linear(40, 30)
    x, gy = torch.randn(8, 40).half(), (1e-3 * torch.randn(8, 30)).half()
    call = LayerCall("layer", layer, find_rule(layer), dict(layer.named_parameters()), (0, 0))
    directions = {p: 1e-9 * torch.randn_like(p) for p in layer.parameters()}
    products = KeptCall(call, x, gy, frozenset()).inner_products(directions)
    expected = torch.einsum("np,nd,pd->n", gy.double(), x.double(), directions[layer.weight].double())
    expected += gy.double() @ directions[layer.bias].double()
    assert (products - expected).abs().max() < 5e-3 * expected.abs().max()


@pytest.mark.parametrize("length", [1024, 2049, 100_000, 3_000_000])
def test_norms_of_long_rows_keep_their_digits(length: int) -> None:
    """V is their mean less |g|^2, so a float32 sum over millions of squares would be missing in it."""
    rows = (1 + floats(2 if length > 100_000 else 17, length)).float()
    expected = rows.double().square().sum(1)
    assert torch.allclose(squares_per_example(rows), expected, rtol=5e-7, atol=0)
