"""How the tests of this folder hold `PerExample` against the loop over examples, and small models for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adadagrad.core.records import GradientStatistics
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics.base import Request
from adadagrad.statistics.example_instrument import ExampleInstrument
from tests.oracles import naive_statistics, relative_error

BLOCKS = CoordinateReduction(kind="blocks")
NORMS, EVERYTHING = Request(), Request(inner_products=True, coordinates=BLOCKS)
FIELDS = ("grad_norm_sq", "variance_trace", "inner_product_variance", "coordinate_ratio")

Losses = Callable[[nn.Module], Tensor]


class Composite(nn.Module):
    """Parts by name and a function for the forward: ``Composite(lambda self, x: self.a(x), a=nn.Linear(4, 3))``."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@dataclass(frozen=True)
class Row:
    """A model with its arguments in float64, whether a warning announces the fallback, and how to compute losses."""

    name: str
    build: Callable[[], nn.Module]
    args: tuple[Any, ...]
    fallback: bool = False
    losses: Callable[[nn.Module, tuple[Any, ...]], Tensor] | None = None
    train: bool = True

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        return self.build().double().train(self.train)

    def all_losses(self, model: nn.Module) -> Tensor:
        return (self.losses or losses_of)(model, self.args)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def ids(top: int, *shape: int) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(sum(shape)))


def losses_of(model: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """One loss per example from every tensor that the model returns, with targets that differ between examples."""
    total: Tensor | float = 0.0
    for y in tree_leaves(model(*args)):
        rows = y.flatten(1)
        target = torch.linspace(-1, 1, rows.shape[1], dtype=rows.dtype) + torch.arange(len(rows)).to(rows)[:, None] / 3
        total = total + (rows - target).square().sum(1)
    return total


def measure_once(instrument: ExampleInstrument, losses: Losses) -> tuple[GradientStatistics, list[str]]:
    """Measure one step from cleared gradients; return the record and the warnings."""
    instrument.model.zero_grad()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with instrument.micro_batch():
            losses(instrument.model).mean().backward()
        statistics = instrument.finish()
    return statistics, [str(w.message) for w in said if w.category is UserWarning]


def assert_close(measured: GradientStatistics, expected: GradientStatistics, tolerance: float = 1e-10) -> None:
    for field in FIELDS:
        if getattr(measured, field) is not None:
            assert relative_error(getattr(measured, field), getattr(expected, field)) < tolerance, field


def assert_exact(
    instrument: ExampleInstrument, losses: Losses, oracle: Losses | None = None, expected_from: nn.Module | None = None
) -> list[str]:
    """Measure one step and hold it against the loop; return the warnings."""
    model = expected_from or instrument.model
    expected = naive_statistics(model, oracle or losses, BLOCKS)
    statistics, said = measure_once(instrument, losses)
    assert_close(statistics, expected)
    return said
