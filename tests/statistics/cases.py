"""One row per layer or model that `PerExample` must count exactly: how to build it, its input for n examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, its input, whether the fallback (with its warning) counts a part of it, and whether it is random."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int], Tensor]
    fallback: bool = False
    draws: bool = False


class Twice(nn.Module):
    """One Linear called twice, so that its two gradients add before they are squared."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Residual(nn.Module):
    """Two convolutions with GroupNorm, in-place activations, a strided shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(2, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(2, outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)), inplace=True)
        return F.relu(self.norm2(self.second(y)) + self.short(x), inplace=True)


class Attention(nn.Module):
    """Causal self-attention with a packed projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class GPT(nn.Module):
    """A small GPT whose output head is the embedding; positions as asked."""

    def __init__(self, positions: str = "none", vocabulary: int = 11, width: int = 8, length: int = 5) -> None:
        super().__init__()
        self.positions = positions
        self.tokens = nn.Embedding(vocabulary, width)
        if positions == "parameter":
            self.table = nn.Parameter(torch.randn(1, length, width) * 0.1)
        elif positions != "none":
            self.table = nn.Embedding(length, width)
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, 2)
        self.norm2 = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        t = ids.shape[1]
        if self.positions == "parameter":
            x = x + self.table[:, :t]
        elif self.positions == "vector":
            x = x + self.table(torch.arange(t))
        elif self.positions == "row":
            x = x + self.table(torch.arange(t).unsqueeze(0))
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x)


class FunctionalTie(nn.Module):
    """An embedding whose weight is also used by a functional call, where no tap can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.tokens(ids))), self.tokens.weight)


class SequenceFirst(nn.Module):
    """Layers that see (T, n, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x.transpose(0, 1))).tanh().transpose(0, 1)


class Recurrent(nn.Module):
    """A recurrent layer of which the whole sequence, the last states, or both are used."""

    def __init__(self, layer: nn.Module, use: str = "sequence", *, given: bool = False) -> None:
        super().__init__()
        self.layer, self.use, self.first = layer, use, nn.Linear(4, 3) if given else None

    def forward(self, x: Tensor) -> Tensor:
        """Examples first in and out, whatever the layer wants; the first state is a function of the first step."""
        state = () if self.first is None else (self.first(x[:, 0]).expand(self.layer.num_layers, -1, -1).contiguous(),)
        y, end = self.layer(x if self.layer.batch_first else x.transpose(0, 1), *state)
        y = y if self.layer.batch_first else y.transpose(0, 1)
        ends = [h.transpose(0, 1).flatten(1) for h in (end if isinstance(end, tuple) else (end,))]
        found = {"sequence": [y.flatten(1)], "states": ends, "both": [y.flatten(1), *ends]}[self.use]
        return torch.cat(found, 1)


class Cell(nn.Module):
    """A recurrent cell, written out over time."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state


class MultiHead(nn.Module):
    """`torch.nn.MultiheadAttention`, called as the function says, examples first in and out."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], **options: object) -> None:
        super().__init__()
        self.call, self.attention = call, nn.MultiheadAttention(4, 2, **options)
        nn.init.normal_(self.attention.out_proj.bias) if options.get("bias", True) else None

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.attention, x)


def with_weights(attention: nn.Module, x: Tensor) -> Tensor:
    y, weights = attention(x, x, x, average_attn_weights=False)
    return torch.cat([y.flatten(1), weights.flatten(1).exp()], 1)


def turned(attention: nn.Module, x: Tensor) -> Tensor:
    z = x.transpose(0, 1)
    return attention(z, z, z, need_weights=False)[0].transpose(0, 1)


def masked(attention: nn.Module, x: Tensor) -> Tensor:
    """A causal mask that all examples share, and a padding mask that differs."""
    t = x.shape[1]
    padding = torch.zeros(len(x), t, dtype=torch.bool)
    padding[:, -1] = x[:, 0, 0] > 0
    causal = torch.ones(t, t, dtype=torch.bool).triu(1)
    return attention(query=x, key=x, value=x, key_padding_mask=padding, attn_mask=causal)[0]


def masks_by_head(attention: nn.Module, x: Tensor) -> Tensor:
    """A mask of examples times heads, which grows by two for each example."""
    mask = (x[:, :, :1] * x[:, None, :, 0]).repeat_interleave(2, 0)
    return attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class TwoInputs(nn.Module):
    """A bilinear layer on two parts of the input."""

    def __init__(self, *sizes: int, bias: bool = True) -> None:
        super().__init__()
        self.pair, self.left = nn.Bilinear(*sizes, bias=bias), sizes[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x[..., : self.left], input2=x[..., self.left :].tanh()).relu_()


class Bag(nn.Module):
    """A bag of tokens for each example: as it is, with sample weights, or flat with offsets."""

    def __init__(self, use: str = "plain", **options: object) -> None:
        super().__init__()
        self.use, self.bag, self.head = use, nn.EmbeddingBag(6, 3, **options), nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        n, t = ids.shape
        offsets = torch.arange(n + self.bag.include_last_offset) * t
        if self.use == "plain":
            y = self.bag(ids)
        elif self.use == "weights":
            y = self.bag(ids, per_sample_weights=ids.to(self.bag.weight) / 3 - 0.5)
        elif self.use == "unequal":  # bags of 1 to t tokens
            sizes = ids[:, 0] % t + 1
            inside = torch.arange(t) < sizes[:, None]
            y = self.bag(ids[inside], sizes.cumsum(0) - sizes)
        else:
            y = self.bag(ids.flatten(), offsets)
        return self.head(y.tanh())


class OutputSize(nn.Module):
    """A transposed convolution that is told how large its output shall be."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=[8, 12]).relu_()


def running(norm: nn.Module) -> nn.Module:
    """A normalisation in eval mode, with running statistics unlike those it starts with."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight)
    return norm.eval()


class Frozen(nn.Module):
    """A frozen weight with a trainable bias, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(5, 5)
        self.first.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def _ids(top: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(0, top, (n, *shape), generator=torch.Generator().manual_seed(n))


def _one(layer: Callable[[], nn.Module], *, before: Callable[[], nn.Module] | None = None) -> Callable[[], nn.Module]:
    """A layer followed by an in-place activation, so that the tap's place in the graph is tested too."""
    return lambda: nn.Sequential(*([before()] if before else []), layer(), nn.ReLU(inplace=True))


CNN_LAYERS = (
    lambda: nn.Conv2d(1, 4, 5, padding=2),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.MaxPool2d(2),
    lambda: nn.Conv2d(4, 6, 5, padding=2),
    lambda: nn.ReLU(inplace=True),
    lambda: nn.MaxPool2d(2),
    lambda: nn.Flatten(),
    lambda: nn.Linear(24, 3),
)

CASES = [
    Case("linear", _one(lambda: nn.Linear(4, 3)), _floats(4)),
    Case("linear without bias", _one(lambda: nn.Linear(4, 3, bias=False)), _floats(4)),
    Case("linear, sequence, gram", _one(lambda: nn.Linear(40, 30)), _floats(3, 40)),
    Case("linear, sequence, direct", _one(lambda: nn.Linear(4, 3)), _floats(9, 4)),
    Case("linear, four dimensions", _one(lambda: nn.Linear(4, 3)), _floats(2, 5, 4)),
    Case("conv1d", _one(lambda: nn.Conv1d(3, 4, 3)), _floats(3, 9)),
    Case("conv1d, dilation, stride", _one(lambda: nn.Conv1d(3, 4, 3, 2, 2, 2)), _floats(3, 11)),
    Case("conv2d", _one(lambda: nn.Conv2d(3, 4, 3)), _floats(3, 7, 6)),
    Case(
        "conv2d, groups, stride, padding",
        _one(lambda: nn.Conv2d(4, 6, 3, (2, 1), (1, 2), groups=2)),
        _floats(4, 7, 6),
    ),
    Case("conv2d, depthwise, dilation", _one(lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=4)), _floats(4, 8, 7)),
    Case("conv2d, same", _one(lambda: nn.Conv2d(2, 3, (3, 2), padding="same")), _floats(2, 6, 5)),
    Case("conv2d, circular", _one(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")), _floats(2, 6, 5)),
    Case("conv2d, stride leaves a rest", _one(lambda: nn.Conv2d(2, 3, 3, stride=2)), _floats(2, 8, 6)),
    Case("conv3d", _one(lambda: nn.Conv3d(2, 4, (2, 3, 2), padding=(1, 0, 1), groups=2)), _floats(2, 4, 5, 4)),
    Case("embedding", lambda: nn.Sequential(nn.Embedding(5, 3), nn.Tanh()), _ids(5, 8)),
    Case("embedding, padding", lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=2), nn.Tanh()), _ids(5, 8)),
    Case("embedding, one token", lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), _ids(5)),
    Case("layer norm", _one(lambda: nn.LayerNorm(6), before=lambda: nn.Linear(6, 6)), _floats(6)),
    Case("layer norm, two dimensions", _one(lambda: nn.LayerNorm((3, 4))), _floats(5, 3, 4)),
    Case("rms norm", _one(lambda: nn.RMSNorm(6)), _floats(4, 6)),
    Case("group norm", _one(lambda: nn.GroupNorm(2, 4)), _floats(4, 3, 3)),
    Case("group norm, no positions", _one(lambda: nn.GroupNorm(2, 4)), _floats(4)),
    Case("called twice", Twice, _floats(6)),
    Case("called twice, sequence", Twice, _floats(3, 6)),
    Case("frozen weight, unused layer", Frozen, _floats(5)),
    Case("cnn", lambda: nn.Sequential(*(layer() for layer in CNN_LAYERS)), _floats(1, 8, 8)),
    Case("residual", lambda: nn.Sequential(Residual(3, 4, 1), Residual(4, 6, 2)), _floats(3, 6, 6)),
    Case("gpt, tied", GPT, _ids(11, 5)),
    Case("gpt, position parameter", lambda: GPT("parameter"), _ids(11, 5)),
    Case("gpt, position ids of one row", lambda: GPT("row"), _ids(11, 5)),
    Case("gpt, position ids as a vector", lambda: GPT("vector"), _ids(11, 5)),
    Case("functional tie", FunctionalTie, _ids(7, 3), fallback=True),
    Case("sequence first", SequenceFirst, _floats(4, 3)),
    Case("transposed conv1d", _one(lambda: nn.ConvTranspose1d(3, 4, 3, 2, output_padding=1)), _floats(3, 5)),
    Case("transposed conv2d", _one(lambda: nn.ConvTranspose2d(2, 3, 3)), _floats(2, 4, 4)),
    Case(
        "transposed conv2d, groups, stride, padding, dilation",
        _one(lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 2), (1, 2), 2, bias=False, dilation=(1, 2))),
        _floats(4, 4, 5),
    ),
    Case("transposed conv2d, depthwise", _one(lambda: nn.ConvTranspose2d(4, 8, 3, 2, groups=4)), _floats(4, 3, 4)),
    Case("transposed conv2d, output size", OutputSize, _floats(2, 3, 4)),
    Case("transposed conv3d", _one(lambda: nn.ConvTranspose3d(2, 4, (2, 3, 2), 2, groups=2)), _floats(2, 3, 2, 3)),
    Case("instance norm 1d", _one(lambda: nn.InstanceNorm1d(3, affine=True)), _floats(3, 7)),
    Case("instance norm 2d", _one(lambda: nn.InstanceNorm2d(3, affine=True)), _floats(3, 4, 5)),
    Case(
        "instance norm 3d, running statistics in training mode",
        _one(lambda: nn.InstanceNorm3d(2, affine=True, track_running_stats=True)),
        _floats(2, 3, 2, 4),
    ),
    Case(
        "instance norm, running statistics in eval mode",
        _one(lambda: running(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))),
        _floats(3, 4, 5),
    ),
    Case("batch norm in eval mode, no positions", _one(lambda: running(nn.BatchNorm1d(4))), _floats(4)),
    Case("batch norm in eval mode, 1d", _one(lambda: running(nn.BatchNorm1d(4))), _floats(4, 5)),
    Case("batch norm in eval mode, 2d", _one(lambda: running(nn.BatchNorm2d(4))), _floats(4, 3, 3)),
    Case("batch norm in eval mode, 3d", _one(lambda: running(nn.BatchNorm3d(2))), _floats(2, 3, 3, 2)),
    Case("prelu", lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 2)), _floats(4)),
    Case("prelu, in place behind", _one(nn.PReLU), _floats(3, 4)),
    Case("prelu, a slope for each channel", lambda: nn.PReLU(4), _floats(4, 3, 2)),
    Case("prelu, a slope for each feature", lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)), _floats(4)),
    Case("bilinear", lambda: TwoInputs(3, 4, 2), _floats(7)),
    Case("bilinear, positions, gram", lambda: TwoInputs(5, 6, 4), _floats(3, 11)),
    Case("bilinear, positions, direct", lambda: TwoInputs(2, 2, 2, bias=False), _floats(2, 5, 4)),
    Case("embedding bag, mean", Bag, _ids(6, 5)),
    Case("embedding bag, sum", lambda: Bag(mode="sum"), _ids(6, 5)),
    Case("embedding bag, mean, padding", lambda: Bag(padding_idx=2), _ids(6, 3)),
    Case("embedding bag, sample weights", lambda: Bag("weights", mode="sum", padding_idx=0), _ids(6, 5)),
    Case("embedding bag, offsets", lambda: Bag("offsets"), _ids(6, 5)),
    Case(
        "embedding bag, last offset, padding",
        lambda: Bag("offsets", mode="sum", include_last_offset=True, padding_idx=1),
        _ids(6, 5),
    ),
    Case("embedding bag, offsets of unequal bags", lambda: Bag("unequal", padding_idx=4), _ids(6, 5)),
    Case("embedding bag, maximum", lambda: Bag(mode="max"), _ids(6, 5)),
    Case("attention", lambda: MultiHead(lambda a, x: a(x, x, x)[0], batch_first=True), _floats(5, 4)),
    Case("attention, its weights used too", lambda: MultiHead(with_weights, batch_first=True), _floats(5, 4)),
    Case("attention, sequence first, no weights", lambda: MultiHead(turned), _floats(5, 4)),
    Case("attention, no bias", lambda: MultiHead(turned, bias=False), _floats(5, 4)),
    Case("attention, masks", lambda: MultiHead(masked, batch_first=True), _floats(5, 4)),
    Case("attention, masks by head", lambda: MultiHead(masks_by_head, batch_first=True), _floats(5, 4)),
    Case("attention with dropout", lambda: MultiHead(turned, dropout=0.4), _floats(5, 4), draws=True),
    Case(
        "attention with dropout and weights",
        lambda: MultiHead(with_weights, dropout=0.4, batch_first=True, add_zero_attn=True),
        _floats(5, 4),
        draws=True,
    ),
    Case(
        "cross attention",
        lambda: MultiHead(lambda a, x: a(x[:, :2], x[:, 2:], x[:, 2:])[0], batch_first=True),
        _floats(5, 4),
    ),
    Case(
        "cross attention, one memory",
        lambda: MultiHead(lambda a, x: (lambda m: a(x, m, m)[0])(x[:, 2:].tanh()), batch_first=True),
        _floats(5, 4),
    ),
    Case(
        "cross attention, other widths",
        lambda: MultiHead(lambda a, x: a(x, x[:, :, :3], x[..., 2:])[0], batch_first=True, kdim=3, vdim=2),
        _floats(5, 4),
    ),
    Case(
        "encoder layer", lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.2, batch_first=True), _floats(5, 4), draws=True
    ),
    Case("rnn, sequence first", lambda: Recurrent(nn.RNN(4, 3)), _floats(5, 4)),
    Case("rnn, relu, no bias", lambda: Recurrent(nn.RNN(4, 3, nonlinearity="relu", bias=False)), _floats(5, 4)),
    Case("gru, examples first", lambda: Recurrent(nn.GRU(4, 3, batch_first=True)), _floats(5, 4)),
    Case(
        "gru, two layers, two directions, states",
        lambda: Recurrent(nn.GRU(4, 3, 2, bidirectional=True), "both"),
        _floats(5, 4),
    ),
    Case("gru, given state", lambda: Recurrent(nn.GRU(4, 3, 2), "states", given=True), _floats(5, 4)),
    Case("lstm, sequence first", lambda: Recurrent(nn.LSTM(4, 3)), _floats(5, 4)),
    Case("lstm, examples first", lambda: Recurrent(nn.LSTM(4, 3, 2, batch_first=True), "states"), _floats(5, 4)),
    Case(
        "lstm, two directions, projected",
        lambda: Recurrent(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True, proj_size=2), "both"),
        _floats(5, 4),
    ),
    Case("rnn cell", lambda: Cell(nn.RNNCell(4, 3)), _floats(3, 4)),
    Case("rnn cell, relu", lambda: Cell(nn.RNNCell(4, 3, nonlinearity="relu")), _floats(3, 4)),
    Case("gru cell", lambda: Cell(nn.GRUCell(4, 3)), _floats(3, 4)),
    Case("lstm cell", lambda: Cell(nn.LSTMCell(4, 3)), _floats(3, 4)),
    Case("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), _floats(4), fallback=True),
]


def losses(model: nn.Module, x: Tensor, start: int = 0) -> Tensor:
    """One loss per example; `start` is the number of the first one, on which its target depends."""
    y = model(x).flatten(1)
    target = (
        torch.linspace(-1, 1, y.shape[1], dtype=y.dtype) + torch.arange(start, start + len(y)).to(y).unsqueeze(1) / 3
    )
    return (y - target).square().sum(1)
