"""sum_i w_i g_ij^2 of every rule, coordinate by coordinate, against the gradients that it materialises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adadagrad.statistics.rules import chunking, find_rule, linear, per_example_sums
from adadagrad.statistics.rules.product import ProductRule
from tests.statistics.checking import floats, ids

N = 7
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(5, 4), floats(N, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), floats(N, 5)),
    "linear, positions": (lambda: nn.Linear(5, 4), floats(N, 3, 5)),
    "linear, one position": (lambda: nn.Linear(5, 4), floats(N, 1, 5)),
    "conv1d": (lambda: nn.Conv1d(8, 4, 3, 2, 1), floats(N, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, (2, 1), (1, 0), dilation=(1, 2), groups=2), floats(N, 8, 9, 7)),
    "conv2d, few channels": (lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2)), floats(N, 2, 9, 7)),
    "conv2d, few channels, circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        floats(N, 2, 5, 5),
    ),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 3, 2), floats(N, 3, 4, 4)),
    "embedding": (lambda: nn.Embedding(6, 3, padding_idx=2), ids(6, N, 8)),
    "embedding, one token": (lambda: nn.Embedding(6, 3), ids(6, N)),
    "layer norm": (lambda: nn.LayerNorm(4), floats(N, 5, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), floats(N, 4, 3, 3)),
    "prelu": (lambda: nn.PReLU(4), floats(N, 4, 3)),
}
WEIGHTS = torch.tensor([0.5, 0.0, 3.0, 1e4, 0.0, 0.25, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 3, 1000], ids=lambda n: f"{n} at a time")
@pytest.mark.parametrize("name", LAYERS)
def test_square_sums(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    build, x = LAYERS[name]
    layer = build().double()
    gy = torch.randn_like(layer(x))
    rule, parameters = find_rule(layer), dict(layer.named_parameters())
    gradients = rule.gradients(layer, x, gy, parameters.keys())
    for module in (per_example_sums, linear):
        monkeypatch.setattr(module, "ROWS", chunk)
    monkeypatch.setattr(chunking, "CHUNK_BYTES", chunk * rule.bytes_per_example(layer, x, gy, parameters))
    found = rule.square_sums(layer, x, gy, parameters, WEIGHTS)
    assert found.keys() == parameters.keys()
    for key, total in found.items():
        expected = torch.einsum("n,n...->...", WEIGHTS, gradients[key].square())
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["linear", "linear, positions", "conv2d", "layer norm"])
@pytest.mark.parametrize("kept", ["weight", "bias"])
def test_only_what_is_wanted(name: str, kept: str) -> None:
    torch.manual_seed(5)
    build, x = LAYERS[name]
    layer = build().double()
    gy = torch.randn_like(layer(x))
    rule, parameters = find_rule(layer), {kept: getattr(layer, kept)}
    (total,) = rule.square_sums(layer, x, gy, parameters, WEIGHTS).values()
    gradient = rule.gradients(layer, x, gy, {kept})[kept]
    torch.testing.assert_close(total, torch.einsum("n,n...->...", WEIGHTS, gradient.square()), rtol=1e-12, atol=0)


def test_a_product_that_uses_some_rows() -> None:
    rule, x, gy = ProductRule(2, 7), floats(N, 3, 5), floats(N, 3, 4)
    parameters = {"weight": floats(7, 5), "bias": floats(7)}
    found = rule.square_sums(nn.Identity(), x, gy, parameters, WEIGHTS)
    for key, gradient in rule.gradients(nn.Identity(), x, gy, parameters.keys()).items():
        expected = torch.einsum("n,n...->...", WEIGHTS, gradient.square())
        torch.testing.assert_close(found[key], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("positions", [(), (3,)], ids=["one position", "positions"])
def test_float32_over_many_examples(positions: tuple[int, ...]) -> None:
    """Noise of 1e-4 around a mean of 1 in 65,536 examples: added in float32 throughout, sums are off by 1e-6."""
    torch.manual_seed(0)
    n, layer = 1 << 16, nn.Linear(3, 2)
    x, gy = 1 + 1e-4 * torch.randn(n, *positions, 3), 1 + 1e-4 * torch.randn(n, *positions, 2)
    rule, parameters = find_rule(layer), dict(layer.named_parameters())
    weights = torch.full((n,), float(n), dtype=torch.float64)
    found = rule.square_sums(layer, x, gy, parameters, weights)
    exact = rule.gradients(layer, x.double(), gy.double(), parameters.keys())
    for key, total in found.items():
        torch.testing.assert_close(total, n * exact[key].square().sum(0), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", [(), (3,)], ids=["one position", "positions"])
def test_squares_of_half_precision_do_not_underflow(dtype: torch.dtype, positions: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(5, 4)
    x, gy = torch.randn(N, *positions, 5).to(dtype), (1e-4 * torch.randn(N, *positions, 4)).to(dtype)
    rule, parameters = find_rule(layer), dict(layer.named_parameters())
    found = rule.square_sums(layer, x, gy, parameters, WEIGHTS)
    exact = rule.gradients(layer, x.double(), gy.double(), parameters.keys())
    for key, total in found.items():
        expected = torch.einsum("n,n...->...", WEIGHTS, exact[key].square())
        assert (total - expected).abs().max() < 0.02 * expected.max()
