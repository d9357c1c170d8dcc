"""What people build around layers: adapters, layer scale, containers, several outputs and losses, batches second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from adadagrad.core.errors import InvalidMeasurement, UncoveredParameter
from adadagrad.statistics import PerExample
from adadagrad.statistics.base import Request
from tests.statistics.checking import EVERYTHING, NORMS, Composite, Row, assert_exact, floats, losses_of

BOTH = pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
X, SEQUENCE = (floats(6, 4),), (floats(6, 5, 4),)
Linear = nn.Linear


class Adapter(nn.Module):
    """A frozen layer with a low-rank update beside it, made of two more layers (LoRA)."""

    def __init__(self, layer: nn.Module, rank: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer, self.drop = layer.requires_grad_(False), nn.Dropout(dropout)
        self.down = Linear(layer.in_features, rank, bias=False)
        self.up = Linear(rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2 * self.up(self.down(self.drop(x)))


class FactorAdapter(nn.Module):
    """The same with bare parameters."""

    def __init__(self, layer: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.down), self.up)


class MergedAdapter(Linear):
    """A subclass of the layer that adds the update to its weight before it multiplies."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


class Update(nn.Module):
    """A parametrization: a convolution's weight plus an update of low rank."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(1, inputs)), nn.Parameter(torch.randn(outputs, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down)[:, :, None]


def updated_convolution() -> nn.Module:
    layer = nn.Conv1d(5, 3, 2)
    layer.weight.requires_grad_(False)
    nn.utils.parametrize.register_parametrization(layer, "weight", Update(3, 5))
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), Linear(9, 2))


class Scaled(nn.Module):
    """A residual branch with a gain for each channel (layer scale)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(width), Linear(width, width)
        self.gain = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.layer(self.norm(x))


def containers() -> nn.Module:
    inner = nn.ModuleDict({"a": nn.ModuleList([nn.Sequential(nn.Sequential(Linear(4, 3)), nn.Tanh())])})
    parts = {"outer": nn.ModuleList([inner, nn.ModuleDict({"b": Linear(3, 2)})])}
    return Composite(lambda m, x: m.outer[1]["b"](m.outer[0]["a"][0](x)), **parts)


def everything_returned(m: nn.Module, x: Tensor) -> dict[str, object]:
    hidden = torch.tanh(m.a(x))
    return {"hidden": hidden, "heads": (m.b(hidden), [m.c(hidden), None]), "size": 3, "name": "words"}


def several_losses(m: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    """Two heads with losses of their own, and a penalty on the activations."""
    found = m(*args)
    heads, hidden = found["heads"], found["hidden"]
    first = F.cross_entropy(heads[0], torch.arange(len(hidden)) % 2, reduction="none")
    return first + 0.3 * F.smooth_l1_loss(heads[1][0], hidden[:, :2], reduction="none").sum(1) + hidden.abs().sum(1)


def three_parts(outputs: Callable[..., object]) -> nn.Module:
    return Composite(outputs, a=Linear(4, 3), b=Linear(3, 2), c=Linear(3, 2))


def parts_of_a_list(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([m.a(x)[:, k : k + 1] * gain for k, gain in enumerate(m.gains)], 1)


def with_gradient(m: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return losses_of(m, (args[0].clone().requires_grad_(),))


def packed(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """Sequences of unequal length, without their padding."""
    sequences = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return m.head(pad_packed_sequence(m.layer(sequences)[0], batch_first=True, total_length=x.shape[1])[0])


EXACT = [
    Row(
        "packed sequences",
        lambda: Composite(packed, layer=nn.LSTM(4, 3, batch_first=True), head=Linear(3, 2)),
        (floats(6, 5, 4), torch.tensor([5, 3, 4, 1, 2, 5])),
        True,
    ),
    Row("adapter", lambda: nn.Sequential(Linear(4, 4), nn.Tanh(), Adapter(Linear(4, 3))), X),
    Row("adapter with dropout", lambda: nn.Sequential(Adapter(Linear(4, 4), dropout=0.4), Linear(4, 2)), SEQUENCE),
    Row("adapter of factors", lambda: nn.Sequential(FactorAdapter(Linear(4, 4)), Linear(4, 3)), SEQUENCE, True),
    Row("merged adapter", lambda: nn.Sequential(MergedAdapter(4, 4), nn.Dropout(0.3), MergedAdapter(4, 3)), SEQUENCE),
    Row("update as a parametrization", updated_convolution, SEQUENCE, True),
    Row("layer scale", lambda: nn.Sequential(Scaled(4), Scaled(4), Linear(4, 2)), SEQUENCE, True),
    Row("containers in containers", containers, X),
    Row(
        "list of parameters",
        lambda: Composite(parts_of_a_list, a=Linear(4, 3), gains=nn.ParameterList([torch.randn(2) for _ in range(3)])),
        X,
        True,
    ),
    Row("tuples and dictionaries, losses added", lambda: three_parts(everything_returned), X, losses=several_losses),
    Row(
        "one of the outputs has no loss",
        lambda: three_parts(everything_returned),
        X,
        losses=lambda m, args: m(*args)["heads"][0].square().sum(1),
    ),
    Row(
        "input that needs a gradient",
        lambda: nn.Sequential(Linear(4, 3), nn.Tanh(), Linear(3, 2)),
        SEQUENCE,
        losses=with_gradient,
    ),
]


@BOTH
@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("row", EXACT, ids=lambda row: row.name)
def test_exact(row: Row, request_: Request) -> None:
    model = row.model()
    instrument = PerExample().open(model, request_)

    def losses(m: nn.Module) -> Tensor:
        torch.manual_seed(5)
        return row.all_losses(m)

    for repeat in range(4):  # the fourth verifies nothing, and so may be fused
        assert bool(assert_exact(instrument, losses)) == (row.fallback and repeat == 0)


@BOTH
@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("positions", [5, 6])
@pytest.mark.parametrize("layer", [nn.GRU(4, 3), nn.LSTM(4, 3, 2)], ids=["gru", "lstm"])
def test_a_model_that_is_given_the_batch_second_is_refused(layer: nn.Module, positions: int, request_: Request) -> None:
    """Six examples, as many positions or fewer: the first dimension of the model's arguments must be the batch."""
    torch.manual_seed(3)
    model = Composite(lambda m, x: m.layer(x)[0], layer=layer).double()
    instrument = PerExample().open(model, request_)
    for _ in range(4):
        model.zero_grad()
        with instrument.micro_batch(6):
            model(floats(positions, 6, 4)).square().sum((0, 2)).mean().backward()
        with pytest.raises((InvalidMeasurement, UncoveredParameter)):
            instrument.finish()
