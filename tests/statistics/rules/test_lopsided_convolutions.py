"""Convolutions whose kernel, stride, padding and dilation differ in every direction: none may stand for another."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from adadagrad.statistics.rules import FUSED
from adadagrad.statistics.rules.convolution import ConvolutionRule
from adadagrad.statistics.rules.fused_convolution import FusedConvolution
from adadagrad.statistics.rules.patch_gram import gram_is_cheaper, gram_square_norms
from tests.statistics.checking import floats

N = 3
LOPSIDED = [
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": (1, 3), "stride": (3, 1), "padding": (1, 0), "dilation": (3, 2)},
    {"kernel_size": (3, 1), "stride": (1, 3), "padding": (0, 1), "dilation": (2, 3)},
    {"kernel_size": (2, 2), "stride": (2, 3), "padding": (1, 2), "dilation": (3, 1)},
]
SIZES = [(8, 7), (7, 9)]


def autograd(layer: nn.Module, x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the input, and every example's of the weight."""
    x = x.detach().requires_grad_()
    dx = torch.autograd.grad(layer(x), x, gy)[0]
    rows = [torch.autograd.grad(layer(x[i : i + 1]), layer.weight, gy[i : i + 1])[0] for i in range(len(x))]
    return dx, torch.stack(rows)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("settings", LOPSIDED, ids=lambda s: str(s["kernel_size"]))
@pytest.mark.parametrize("channels", [2, 8], ids=["few channels", "many channels"])
def test_every_rule_gives_autograds_gradients(size: tuple[int, int], settings: dict, channels: int) -> None:
    layer, x = nn.Conv2d(channels, 4, **settings).double(), floats(N, channels, *size)
    gy = torch.randn(layer(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dx, rows = autograd(layer, x, gy)
    torch.testing.assert_close(gram_square_norms(layer, x, gy), rows.flatten(1).square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(ConvolutionRule().gradients(layer, x, gy, {"weight"})["weight"], rows)
    check_fused(layer, x, gy, dx, rows)


@pytest.mark.parametrize("channels", [2, 8], ids=["few channels", "many channels"])
def test_three_dimensions(channels: int) -> None:
    layer = nn.Conv3d(channels, 4, (2, 1, 3), (1, 2, 3), (2, 1, 0), (3, 1, 2)).double()
    x = floats(N, channels, 5, 4, 9)
    gy = torch.randn(layer(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check_fused(layer, x, gy, *autograd(layer, x, gy))


def check_fused(layer: nn.Module, x: Tensor, gy: Tensor, dx: Tensor, rows: Tensor) -> None:
    rule = FUSED[type(layer)]
    assert isinstance(rule, FusedConvolution)
    y, saved = rule.forward(layer, x)
    assert torch.equal(y, layer(x))
    found, parts = rule.backward(layer, x, saved, gy, wants_x=True)
    torch.testing.assert_close(found, dx)
    weights = torch.cat([part["weight"].reshape(-1, *layer.weight.shape) for part in parts])
    torch.testing.assert_close(weights, rows)


def test_position_products_are_priced_by_the_positions_that_there_are() -> None:
    """Half of T d p against Tp^2 C + T^2 (p + 8 k), with T and Tp from torch itself."""
    draw = random.Random(4)
    answers = []
    for _ in range(4000):
        channels, made = (draw.choice((16, 48, 64, 96, 192)) for _ in range(2))
        one_of = lambda *values: tuple(draw.choice(values) for _ in range(2))  # noqa: E731
        kernel, stride, padding, dilation = one_of(1, 2, 3, 5), one_of(1, 2, 3), one_of(0, 1, 2, 3), one_of(1, 2)
        layer = nn.Conv2d(channels, made, kernel, stride, padding, dilation, device="meta")
        smallest = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True)]
        size = [draw.randrange(max(1, least), 12) for least in smallest]
        x = torch.empty(1, channels, *size, device="meta")
        pad = nn.ZeroPad2d((padding[1], padding[1], padding[0], padding[0]))
        positions, outputs = pad(x)[0, 0].numel(), layer(x)[0, 0].numel()
        elements = kernel[0] * kernel[1]
        gram = positions**2 * channels + outputs**2 * (made + 8 * elements)
        answers.append(2 * gram < outputs * channels * elements * made)
        assert gram_is_cheaper(layer, x) == answers[-1], layer
    assert 200 < sum(answers) < 3800


@pytest.mark.parametrize("settings", [{"groups": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
def test_position_products_are_left_alone_where_they_would_be_wrong(settings: dict) -> None:
    plain = nn.Conv2d(192, 192, 3, padding=1, device="meta")
    x = torch.empty(1, 192, 4, 4, device="meta")
    assert gram_is_cheaper(plain, x)
    assert not gram_is_cheaper(nn.Conv2d(192, 192, 3, device="meta", **settings), x)
