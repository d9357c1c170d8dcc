"""Nested tensors are refused by a typed error, and the training's own backward goes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidMeasurement
from adadagrad.statistics import GradientMeter, MicroBatch, PerExample
from adadagrad.statistics.base import Request
from tests.statistics.checking import EVERYTHING, NORMS, Composite, floats, losses_of

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def rows(x: Tensor) -> list[Tensor]:
    """Examples of one to four positions."""
    return [row[: i % 4 + 1] for i, row in enumerate(x)]


def summed(y: Tensor) -> Tensor:
    return torch.stack([part.sum(0) for part in y.unbind()])


def outside(m: nn.Module, x: Tensor) -> Tensor:
    return summed(m.b(m.a(x)))


def inside(m: nn.Module, x: Tensor) -> Tensor:
    return summed(m.b(m.a(torch.nested.as_nested_tensor(rows(x), layout=torch.jagged))))


def model_of(function) -> nn.Module:
    torch.manual_seed(4)
    return Composite(function, a=nn.Linear(4, 3), b=nn.Linear(3, 2)).double()


@pytest.mark.parametrize("request_", [NORMS, EVERYTHING], ids=["norms", "everything"])
@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("where", ["jagged", "strided", "inside"])
def test_they_are_refused_and_the_gradient_is_right(where: str, calibrate: bool, request_: Request) -> None:
    x = floats(6, 5, 4)
    if where == "inside":
        model, plain = model_of(inside), model_of(inside)
    else:
        model, plain = model_of(outside), model_of(outside)
        layout = torch.jagged if where == "jagged" else torch.strided
        x = torch.nested.nested_tensor(rows(x), layout=layout)
    losses_of(plain, (x,)).mean().backward()
    instrument = PerExample(calibrate=calibrate).open(model, request_)
    for _ in range(4):
        model.zero_grad()
        with instrument.micro_batch(6):
            losses_of(model, (x,)).mean().backward()
        with pytest.raises(InvalidMeasurement, match="nested tensors"):
            instrument.finish()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-12)


def test_units_can_be_measured() -> None:
    model, x = model_of(inside), floats(6, 5, 4)
    meter = GradientMeter(model, MicroBatch())
    for part in x.split(3):
        with meter.micro_batch(3, 1 / 6):
            (losses_of(model, (part,)).sum() / 6).backward()
    assert meter.statistics().variance_trace > 0
