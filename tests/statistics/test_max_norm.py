"""Embeddings with `max_norm`, whose lookups shorten rows of the table in place.

A row is shortened by its own norm alone, before anything is looked up, so an example finds the same rows by itself as
in the batch: the gradients per example exist, and the rule for embeddings counts them. (Where an output head reads the
whole table, they are the gradients at the table as the batch's lookup has left it.) Shortening again changes a row once
more, by rounding, so trial runs and reruns put the table back.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adadagrad.statistics import PerExample
from adadagrad.statistics.base import Request
from tests.oracles import relative_error
from tests.statistics.checking import EVERYTHING, NORMS, Composite, ids, losses_of, measure_once

BOTH = pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])


def plain() -> nn.Module:
    return nn.Sequential(nn.Embedding(30, 4, max_norm=0.7), nn.Tanh(), nn.Linear(4, 3))


def tied() -> nn.Module:
    """The output head reads the shortened rows too."""
    model = nn.Sequential(nn.Embedding(30, 4, max_norm=0.7, padding_idx=0), nn.Tanh(), nn.Linear(4, 30, bias=False))
    model[2].weight = model[0].weight
    return model


def rerun() -> nn.Module:
    """A gain that only a rerun of the model counts, and a bag that is rerun with it."""
    parts = {"e": nn.Embedding(30, 3, max_norm=0.7), "b": nn.EmbeddingBag(30, 3, max_norm=0.5)}
    return Composite(lambda m, x: m.e(x) * m.gain + m.b(x)[:, None], **parts, gain=nn.Parameter(torch.ones(3)))


MODELS = [plain, tied, rerun]


def build(model: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    built = model()
    for p in built.parameters():
        nn.init.normal_(p)
    return built.to(dtype)


def one_by_one(build_: Callable[[], nn.Module], x: Tensor) -> Tensor:
    """The gradient of every example when it is the only one, each from the table as it was (n, d)."""
    rows = []
    for i in range(len(x)):
        model = build_()
        if isinstance(model, nn.Sequential) and model[2].weight is model[0].weight:
            model[0](x)
        y = model(x[i : i + 1]).flatten(1)
        target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype) + i / 3
        (y - target).square().sum().backward()
        rows.append(
            torch.cat([
                torch.zeros(p.numel()).to(p) if p.grad is None else p.grad.flatten() for p in model.parameters()
            ])
        )
    return torch.stack(rows)


@BOTH
@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("model", MODELS)
def test_every_example_by_itself_has_the_gradient_that_is_counted(
    model: Callable[[], nn.Module], request_: Request
) -> None:
    x = ids(30, 6, 5)
    rows = one_by_one(lambda: build(model, torch.float64), x)
    for _ in range(2):
        instrument = PerExample().open(build(model, torch.float64), request_)
        for _ in range(4):
            statistics, _ = measure_once(instrument, lambda m: losses_of(m, (x,)))
            assert relative_error(statistics.variance_trace, float(rows.var(0).sum())) < 1e-10
            assert relative_error(statistics.grad_norm_sq, float(rows.mean(0).square().sum())) < 1e-10


@BOTH
@pytest.mark.filterwarnings("ignore:.*no rule counts")
@pytest.mark.parametrize("model", MODELS)
def test_measuring_changes_no_bit_of_the_table(model: Callable[[], nn.Module], request_: Request) -> None:
    """Some float32 rows are a little too long again after they were shortened, and the next lookup shortens them."""
    measured, other = build(model, torch.float32), build(model, torch.float32)
    instrument = PerExample(fuse=False).open(measured, request_)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (measured, other)]
    for step in range(5):
        x = ids(30, 40, 5 + step)
        measure_once(instrument, lambda m, x=x: losses_of(m, (x,)))
        other.zero_grad()
        losses_of(other, (x,)).mean().backward()
        for p, q in zip(measured.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)
        for optimizer in optimizers:
            optimizer.step()
