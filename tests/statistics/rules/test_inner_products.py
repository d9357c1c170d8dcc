"""<g_i, v> of every rule against the gradients that it materialises, for any of its parameters."""

from __future__ import annotations

import pytest
import torch

from adadagrad.statistics.rules import find_rule, per_example_sums
from adadagrad.statistics.rules.per_example_sums import products_per_example
from tests.statistics.checking import floats
from tests.statistics.rules.test_square_sums import LAYERS, N

SMALLEST = 1
"""Bytes of products at a time: an example each."""


@pytest.mark.parametrize("kept", [("weight", "bias"), ("weight",), ("bias",)], ids=" and ".join)
@pytest.mark.parametrize("name", LAYERS)
def test_inner_products(name: str, kept: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    build, x = LAYERS[name]
    layer = build().double()
    gy = torch.randn_like(layer(x))
    directions = {key: torch.randn_like(p) for key, p in layer.named_parameters() if key in kept}
    if not directions:
        pytest.skip("no such parameter")
    rule = find_rule(layer)
    expected, sizes = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for key, gradient in rule.gradients(layer, x, gy, directions.keys()).items():
        expected += (gradient * directions[key]).flatten(1).sum(1)
        sizes += gradient.flatten(1).norm(dim=1) * directions[key].norm()
    for _ in range(2):
        found = rule.inner_products(layer, x, gy, directions)
        assert ((found - expected).abs() <= 1e-12 * sizes).all()
        monkeypatch.setattr(per_example_sums, "PRODUCT_BYTES", SMALLEST)
    if x.is_floating_point():
        single = {key: v.float() for key, v in directions.items()}
        found = rule.inner_products(layer.float(), x.float(), gy.float(), single)
        assert ((found - expected).abs() <= 1e-6 * sizes).all()


@pytest.mark.parametrize("sign", [0, 1], ids=["any sign", "one sign"])
def test_float32_products_of_long_rows(sign: int) -> None:
    """Added one after the other in float32, a million products of one sign would be off by about 1e-4."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 1 << 10, 1 << 10, generator=generator).abs_() for _ in range(2))
    if not sign:
        left *= torch.randint(0, 2, left.shape, generator=generator) * 2 - 1
    exact = (left.double() * right.double()).sum((1, 2))
    sizes = left.flatten(1).double().norm(dim=1) * right.flatten(1).double().norm(dim=1)
    assert ((products_per_example(left, right) - exact).abs() < 1e-6 * sizes).all()


def test_layouts_and_broadcasting() -> None:
    left, right = floats(N, 4, 3).mT, floats(N, 3, 4)
    expected = (left * right).sum((1, 2))
    torch.testing.assert_close(products_per_example(left, right), expected, rtol=1e-12, atol=1e-12)
    expected = (left * right[0, 0]).sum((1, 2))
    torch.testing.assert_close(products_per_example(left, right[0, 0]), expected, rtol=1e-12, atol=1e-12)
    assert products_per_example(torch.zeros(3, 0), torch.zeros(0)).tolist() == [0.0] * 3
    assert products_per_example(torch.zeros(0, 3), torch.zeros(3)).shape == (0,)
