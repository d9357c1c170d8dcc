"""Random small networks of the supported layers: all four numbers equal the loop over examples to 1e-10.

Always 30 networks; 600 with ADADAGRAD_SLOW=1.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adadagrad.statistics import PerExample
from tests.oracles import example_gradients, naive_statistics
from tests.statistics.checking import BLOCKS, EVERYTHING, NORMS, assert_close, losses_of, measure_once

EXAMPLES = 600 if os.environ.get("ADADAGRAD_SLOW") else 30
Draw = Callable[[st.SearchStrategy], object]


class Steps(nn.Module):
    """Layers one after the other; a layer may stand at several places (reuse), and so may a weight (tying)."""

    def __init__(self, layers: list[nn.Module], order: list[int]) -> None:
        super().__init__()
        self.layers, self.order = nn.ModuleList(layers), order

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = self.layers[index](x)
        return x


class Flip(nn.Module):
    """Sequences first, or examples first again."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class Recurrence(nn.Module):
    """A GRU's outputs, added to what it is given."""

    def __init__(self, width: int, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.GRU(width, width, batch_first=first)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)[0]


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, added to it."""

    def __init__(self, width: int, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(width, 1, batch_first=first)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x, x, x, need_weights=False)[0]


class Unknown(nn.Module):
    """A leaf that no rule knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.turn = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.turn) * self.gain


def pair(draw: Draw, low: int, high: int) -> tuple[int, int]:
    return draw(st.integers(low, high)), draw(st.integers(low, high))


def convolution(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    layer = nn.Conv2d(
        channels,
        outputs,
        pair(draw, 1, 3),
        stride=pair(draw, 1, 2),
        padding=pair(draw, 0, 1),
        dilation=pair(draw, 1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return layer, outputs


def images(draw: Draw, n: int) -> tuple[nn.Module, Tensor]:
    channels = draw(st.integers(1, 3))
    x = torch.randn(n, channels, draw(st.integers(14, 16)), draw(st.integers(14, 16)), dtype=torch.float64)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2))):
        layer, channels = convolution(draw, channels)
        layers.append(layer)
        if draw(st.integers(0, 3)) == 0:
            outputs = draw(st.integers(1, 3))
            layers.append(nn.ConvTranspose2d(channels, outputs, pair(draw, 1, 3), pair(draw, 1, 2)))
            channels = outputs
        if draw(st.integers(0, 3)) == 0:
            layers.append(nn.InstanceNorm2d(channels, affine=True))
        if draw(st.booleans()):
            groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
            layers.append(nn.GroupNorm(groups, channels))
        layers.append(draw(st.sampled_from([nn.Tanh(), nn.GELU(), nn.SiLU(inplace=True), nn.PReLU(channels)])))
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)]
    return Steps(layers, list(range(len(layers)))), x


def sequences(draw: Draw, n: int) -> tuple[nn.Module, Tensor]:
    width, length = draw(st.integers(2, 5)), draw(st.sampled_from([1, 2, n, n + 1]))
    layers: list[nn.Module] = []
    if tokens := draw(st.booleans()):
        layers.append(nn.Embedding(7, width, padding_idx=draw(st.sampled_from([None, 0]))))
    if flipped := draw(st.booleans()):
        layers.append(Flip())
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["linear", "layer norm", "rms norm", "recurrence", "attention", "unknown"]))
        if kind == "linear":
            layers.append(nn.Linear(width, width, bias=draw(st.booleans())))
        elif kind in {"recurrence", "attention"}:
            layers.append((Recurrence if kind == "recurrence" else SelfAttention)(width, first=not flipped))
        elif kind == "unknown":
            layers.append(Unknown(width))
        else:
            layers.append((nn.LayerNorm if kind == "layer norm" else nn.RMSNorm)(width))
        layers.append(nn.Tanh())
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len(linears) > 1 and draw(st.booleans()):
        linears[-1].weight = linears[0].weight
    order = list(range(len(layers)))
    if draw(st.booleans()):  # once more through everything but the embedding and the flip
        order += order[int(tokens) + int(flipped) :]
    if flipped:
        layers.append(Flip())
        order.append(len(layers) - 1)
    if tokens and draw(st.booleans()):
        head = nn.Linear(width, 7, bias=False)
        head.weight = layers[0].weight
        layers.append(head)
        order.append(len(layers) - 1)
    shape = (n, length) if tokens else (n, length, width)
    x = torch.randint(0, 7, shape) if tokens else torch.randn(shape, dtype=torch.float64)
    return Steps(layers, order), x


def has_gradients_of_rounding(model: nn.Module, x: Tensor) -> bool:
    """Whether a tensor's gradient is nothing but rounding (a bias in front of a normalisation): its ratio is too."""
    rows = example_gradients(model, lambda m: losses_of(m, (x,)))
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    squares = torch.stack([part.square().sum() for part in rows.split(sizes, 1)])
    return bool(((squares > 0) & (squares < 1e-18 * squares.max())).any())


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 30, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
def test_a_random_network_equals_the_loop(data: st.DataObject) -> None:
    draw = data.draw
    n = draw(st.integers(2, 6))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model, x = draw(st.sampled_from([images, sequences]))(draw, n)
    model.double()
    frozen = [p for p in list(model.parameters())[1:] if p.dim() < 2][: draw(st.integers(0, 1))]
    for p in frozen:
        p.requires_grad_(False)
    note(f"{model} {getattr(model, 'order', '')} on {tuple(x.shape)}")
    expected = naive_statistics(model, lambda m: losses_of(m, (x,)), BLOCKS)
    rounding = expected.coordinate_ratio > 1e10 or has_gradients_of_rounding(model, x)
    for request in (NORMS, EVERYTHING):
        instrument = PerExample().open(model, request)
        for _ in range(4):  # the fourth verifies nothing: norms come promptly from the backward
            statistics, said = measure_once(instrument, lambda m: losses_of(m, (x,)))
            assert said == []
            if rounding:
                statistics = dataclasses.replace(statistics, coordinate_ratio=None)
            assert_close(statistics, expected)
