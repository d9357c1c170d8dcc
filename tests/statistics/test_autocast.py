"""Under autocast, with a gradient scaler where float16 needs one: within one percent of float32 without autocast."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics import GradientMeter, MicroBatch, PerExample
from tests.oracles import naive_statistics, relative_error
from tests.statistics.checking import Composite, ids

N = 48


class Block(nn.Module):
    """A transformer's block with fused attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Tied embedding and head, a table of positions."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tokens, self.table = nn.Embedding(20, width), nn.Parameter(torch.randn(6, width) / 10)
        self.block, self.norm, self.head = Block(width), nn.LayerNorm(width), nn.Linear(width, 20, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.2)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.tokens(x) + self.table))).transpose(1, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 20))


def cnn() -> nn.Module:
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 20))


def recurrent() -> nn.Module:
    return Composite(
        lambda m, x: m.head(m.layer(x)[0][:, -1]), layer=nn.GRU(8, 12, batch_first=True), head=nn.Linear(12, 20)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, torch.randn(N, 32, generator=torch.Generator().manual_seed(1))),
    "cnn": (cnn, torch.randn(N, 2, 8, 8, generator=torch.Generator().manual_seed(2))),
    "transformer": (Transformer, ids(20, N, 6)),
    "recurrent": (recurrent, torch.randn(N, 5, 8, generator=torch.Generator().manual_seed(3))),
}


def losses_of(model: nn.Module, x: Tensor, start: int = 0) -> Tensor:
    """One loss per example, computed in float32."""
    y = model(x).float()
    target = (torch.arange(start, start + len(x)) * 7 % 20).view(-1, *[1] * (y.dim() - 2)).expand(len(x), *y.shape[2:])
    return (
        F.cross_entropy(y, target, reduction="none").flatten(1).mean(1)
        if y.dim() > 2
        else F.cross_entropy(y, target, reduction="none")
    )


@pytest.mark.parametrize("inner_products", [False, True], ids=["norms", "inner products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_within_one_percent_of_float32(name: str, dtype: torch.dtype, inner_products: bool) -> None:
    """Two unequal micro-batches; float16 with a gradient scaler, whose factor is gone before the numbers are read."""
    build, x = MODELS[name]
    torch.manual_seed(4)
    model = build()
    expected = naive_statistics(model, lambda m: losses_of(m, x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    meter = GradientMeter(model, PerExample(), inner_products=inner_products)
    for _ in range(4):
        optimizer.zero_grad()
        start = 0
        for part in x.split((32, 16)):
            with meter.micro_batch(len(part), scaler.get_scale() / N):
                with torch.autocast("cpu", dtype):
                    values = losses_of(model, part, start)
                scaler.scale(values.sum() / N).backward()
            start += len(part)
        scaler.unscale_(optimizer)
        statistics = meter.statistics(scale=1 / scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        assert relative_error(statistics.variance_trace, expected.variance_trace) < 0.01
        assert relative_error(statistics.grad_norm_sq, expected.grad_norm_sq) < 0.01
        assert (
            relative_error(
                statistics.inner_product_variance, expected.inner_product_variance if inner_products else None
            )
            < 0.01
        )


@pytest.mark.parametrize("estimator", [PerExample(), MicroBatch()], ids=["examples", "micro-batches"])
def test_a_scaler_changes_no_number(estimator) -> None:
    """A factor of two is exact, so that everything is equal to the last bit."""
    torch.manual_seed(4)
    x, found = MODELS["mlp"][1], []
    model = mlp()
    for scale in (1.0, 2.0**12):
        twin = copy.deepcopy(model)
        meter = GradientMeter(twin, estimator)
        for start in (0, N // 2):
            with meter.micro_batch(N // 2, scale / N):
                (losses_of(twin, x[start : start + N // 2], start).sum() / N * scale).backward()
        for p in twin.parameters():
            p.grad /= scale
        found.append(meter.statistics(scale=1 / scale))
    assert found[0] == found[1]


def test_a_scale_that_overflows_is_no_number_and_no_error() -> None:
    """A scaler finds its scale by trying: the update is skipped, and so is the decision."""
    torch.manual_seed(4)
    model, x = mlp(), MODELS["mlp"][1]
    meter = GradientMeter(model, PerExample(), inner_products=True)
    for scale in (2.0**40, 2.0**120):
        model.zero_grad()
        with meter.micro_batch(N, scale / N):
            with torch.autocast("cpu", torch.float16):
                values = losses_of(model, x)
            (values.mean() * scale).backward()
        statistics = meter.statistics(scale=1 / scale)
        assert not math.isfinite(statistics.variance_trace)
        assert not math.isfinite(statistics.grad_norm_sq)
