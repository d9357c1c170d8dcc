"""Random small networks of the supported layers: all four numbers equal the loop over examples to 1e-10.

Always 45 networks; 600 with ADADAGRAD_SLOW=1.
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

EXAMPLES = 600 if os.environ.get("ADADAGRAD_SLOW") else 45
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
    """A recurrent layer's outputs, added to what it is given."""

    def __init__(self, width: int, kind: type[nn.Module], depth: int, *, first: bool) -> None:
        super().__init__()
        self.layer = kind(width, width, depth, batch_first=first)

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


class Pair(nn.Module):
    """A bilinear layer on what it is given and a part of it."""

    def __init__(self, width: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.layer, self.part = nn.Bilinear(width, max(1, width - 1), outputs, bias=bias), max(1, width - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[..., : self.part])


class Cells(nn.Module):
    """A recurrent cell written out over positions, its last state added to every position."""

    def __init__(self, width: int, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(width, width)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return x + (state[0] if isinstance(state, tuple) else state)[:, None]


def sizes(draw: Draw, dims: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


def convolution(draw: Draw, channels: int, dims: int) -> tuple[nn.Module, int]:
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        channels,
        outputs,
        sizes(draw, dims, 1, 3),
        stride=sizes(draw, dims, 1, 2),
        padding=sizes(draw, dims, 0, 1),
        dilation=sizes(draw, dims, 1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return layer, outputs


def transposed(draw: Draw, channels: int, dims: int) -> tuple[nn.Module, int]:
    groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, 2))
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    stride = sizes(draw, dims, 1, 2)
    more = tuple(draw(st.integers(0, k - 1)) for k in stride)
    return kind(channels, outputs, sizes(draw, dims, 2, 3), stride, sizes(draw, dims, 0, 1), more, groups), outputs


def images(draw: Draw, n: int) -> tuple[nn.Module, Tensor]:
    """Convolutions over one, two or three dimensions."""
    dims, channels = draw(st.sampled_from([1, 2, 2, 3])), draw(st.integers(1, 3))
    x = torch.randn(n, channels, *sizes(draw, dims, 14 - 3 * (dims == 3), 16 - 4 * (dims == 3)), dtype=torch.float64)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2 if dims < 3 else 1))):
        layer, channels = convolution(draw, channels, dims)
        layers.append(layer)
        if draw(st.integers(0, 2)) == 0:
            layer, channels = transposed(draw, channels, dims)
            layers.append(layer)
        if draw(st.integers(0, 3)) == 0:
            kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
            layers.append(kinds[dims - 1](channels, affine=True))
        if draw(st.booleans()):
            groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
            layers.append(nn.GroupNorm(groups, channels))
        layers.append(draw(st.sampled_from([nn.Tanh(), nn.GELU(), nn.SiLU(inplace=True), nn.PReLU(channels)])))
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](2)
    layers += [pool, nn.Flatten(), nn.Linear(2**dims * channels, 3)]
    return Steps(layers, list(range(len(layers)))), x


def bags(draw: Draw, n: int) -> tuple[nn.Module, Tensor]:
    """A bag of tokens or a vector for each example, and layers of one position."""
    width = draw(st.integers(2, 5))
    layers: list[nn.Module] = []
    if tokens := draw(st.booleans()):
        mode, padding = draw(st.sampled_from(["sum", "mean", "max"])), draw(st.sampled_from([None, 1]))
        layers.append(nn.EmbeddingBag(7, width, mode=mode, padding_idx=padding))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["linear", "bilinear", "norm", "unknown", "prelu"]))
        bias = draw(st.booleans())
        if kind == "linear":
            layers.append(nn.Linear(width, width, bias=bias))
        elif kind == "bilinear":
            layers.append(Pair(width, width, bias=bias))
        elif kind == "norm":
            layers.append(draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))(width))
        else:
            layers.append(Unknown(width) if kind == "unknown" else nn.PReLU(width))
        layers.append(nn.Tanh())
    order = list(range(len(layers)))
    order += order[int(tokens) :] if draw(st.booleans()) else []
    layers.append(nn.Linear(width, 2))
    order.append(len(layers) - 1)
    length = draw(st.integers(1, 4))
    x = torch.randint(0, 7, (n, length)) if tokens else torch.randn(n, width, dtype=torch.float64)
    return Steps(layers, order), x


def sequences(draw: Draw, n: int) -> tuple[nn.Module, Tensor]:
    width, length = draw(st.integers(2, 5)), draw(st.sampled_from([1, 2, n, n + 1]))
    layers: list[nn.Module] = []
    if tokens := draw(st.booleans()):
        layers.append(nn.Embedding(7, width, padding_idx=draw(st.sampled_from([None, 0]))))
    if flipped := draw(st.booleans()):
        layers.append(Flip())
    for _ in range(draw(st.integers(1, 3))):
        kinds = ["linear", "layer norm", "rms norm", "recurrence", "attention", "unknown", "bilinear", "cell"]
        kind = draw(st.sampled_from(kinds))
        if kind == "linear":
            layers.append(nn.Linear(width, width, bias=draw(st.booleans())))
        elif kind == "bilinear":
            layers.append(Pair(width, width, bias=draw(st.booleans())))
        elif kind == "recurrence":
            family, depth = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM])), draw(st.integers(1, 2))
            layers.append(Recurrence(width, family, depth, first=not flipped))
        elif kind == "cell" and not flipped:
            layers.append(Cells(width, draw(st.sampled_from([nn.RNNCell, nn.GRUCell, nn.LSTMCell]))))
        elif kind == "attention":
            layers.append(SelfAttention(width, first=not flipped))
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
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 45, suppress_health_check=[HealthCheck.too_slow]
)
@given(data=st.data())
def test_a_random_network_equals_the_loop(data: st.DataObject) -> None:
    draw = data.draw
    n = draw(st.integers(2, 6))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model, x = draw(st.sampled_from([images, sequences, bags]))(draw, n)
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
