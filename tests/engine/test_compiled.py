"""A compiled model in the engine: one graph for all batch sizes, and the numbers of the model without compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.statistics.compiled import let_batch_size_vary
from tests.engine.cases import Recording, Sizes, make_data, make_engine, train, weights
from tests.statistics.test_compiled import Backend


class Network(nn.Module):
    """A module of its own, because torch compiles none of its containers in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model: nn.Module, **options: Any) -> Any:
    """Twenty-five steps whose sizes are random multiples of eight, every third one measured on its first sixteen."""
    measure = ada.Measure(estimator=ada.PerExample(), every=3, max_examples=16)
    bounds = ada.Bounds(multiple_of=8, max_growth=None)
    options = {"measure": measure, "bounds": bounds, "total_samples": 4000, "micro_batch_size": 48} | options
    engine = make_engine(model, Recording(model.parameters()), make_data(400), Sizes(largest=200), **options)
    return engine, train(engine, steps=25)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_one_graph_for_all_batch_sizes_and_the_same_training(how: str) -> None:
    backend, model = Backend(), Network().double()
    if how == "wrapper":
        compiled = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
        compiled = model
    engine, decisions = run(compiled)
    plain, expected = run(Network().double())
    assert len({decision.plan.global_batch_size for decision in decisions}) > 12
    assert [d.next_plan for d in decisions] == [d.next_plan for d in expected]
    measured = [d.observation.gradient for d in decisions if d.observation.gradient is not None]
    others = [d.observation.gradient for d in expected if d.observation.gradient is not None]
    assert len(measured) == len(others) > 6
    for mine, theirs in zip(measured, others, strict=True):
        assert mine.variance_trace == pytest.approx(theirs.variance_trace, rel=1e-10)
    assert torch.allclose(weights(engine.model), weights(plain.model), rtol=1e-10, atol=1e-12)
    assert backend.graphs == 1
    assert backend.runs > 25
    assert "uncompiled" in engine.measuring.instrument.compiled


def test_only_tensors_with_a_batch_dimension_are_marked() -> None:
    leaf = torch.zeros(3, 2)
    assert let_batch_size_vary(leaf) is leaf
    for other in (torch.tensor(1.0), "word", [1, 2], nn.Parameter(torch.zeros(3))):
        assert let_batch_size_vary(other) is other
