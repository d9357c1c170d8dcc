"""What is measured of a sharded model on many ranks is what the naive loop over examples finds on the whole one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adadagrad as ada
from adadagrad.batching import SampleOrder
from tests.engine.cases import make_data, make_engine, train
from tests.parallel import sharding
from tests.ranks import on_ranks

STEP, STEPS = 25, 4


class Repeated(nn.Sequential):
    """Layers whose activations are made twice, as activation checkpointing does."""

    def __init__(self, *layers: nn.Module, reentrant: bool) -> None:
        super().__init__(*layers)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:
            x = x.requires_grad_() if x.is_leaf else x
        first, *middle, last = self
        x = first(x)
        for layer in middle:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return last(x)


class Positions(nn.Module):
    """One call of a layer on several positions of each example, and a second one of the same layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(1, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.tanh(self.inner(x.unsqueeze(-1))))
        return self.norm(y).mean(1)


MODELS: dict[str, Any] = {
    "layers": lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
    "checkpoint": lambda: Repeated(nn.Linear(5, 7), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3), reentrant=False),
    "positions": lambda: nn.Sequential(Positions(), nn.Linear(4, 3)),
    "frozen": lambda: nn.Sequential(nn.Linear(5, 7).requires_grad_(False), nn.Tanh(), nn.Linear(7, 3)),
}


def make(name: str) -> Any:
    torch.manual_seed(1)
    return MODELS[name]().double()


CASES: dict[str, dict[str, Any]] = {
    "whole": {"shard": "whole"},
    "layers": {},
    "one part": {"shard": "one_part"},
    "but biases": {"shard": "but_biases"},
    "one at a time": {"micro_batch_size": 1},
    "large micro-batches": {"micro_batch_size": 100},
    "part": {"max_examples": 11},
    "part of many micro-batches": {"max_examples": 9, "micro_batch_size": 2},
    "part, one part sharded": {"max_examples": 11, "shard": "one_part"},
    "part, biases not sharded": {"max_examples": 13, "shard": "but_biases"},
    "weights": {"weighted": True},
    "part with weights": {"weighted": True, "max_examples": 11},
    "checkpoint": {"model": "checkpoint"},
    "part with checkpoint": {"model": "checkpoint", "max_examples": 11},
    "layers called twice": {"model": "positions"},
    "frozen": {"model": "frozen", "max_examples": 11},
    "replicas": {"shard": "replicas"},
    "part with replicas": {"shard": "replicas", "max_examples": 11},
}


def each_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def engine_for(model: Any, estimator: Any, policy: Any, max_examples: int | None, **options: Any) -> Any:
    return make_engine(
        model,
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        policy=policy,
        global_batch_size=STEP,
        max_batch_size=STEP,
        bounds=ada.Bounds(monotone=False),
        min_batch_size=STEP,
        measure=ada.Measure(every=1, max_examples=max_examples, estimator=estimator),
        total_samples=STEPS * STEP,
        seed=5,
        **({"micro_batch_size": 3} | options),
    )


def measured(case: dict[str, Any], estimator: Any, policy: Any = None) -> Any:
    settings = dict(case)
    name, shard = settings.pop("model", "layers"), settings.pop("shard", "layers")
    weighted, part = settings.pop("weighted", False), settings.pop("max_examples", None)
    model = make(name)
    getattr(sharding, shard)(model)
    engine = engine_for(model, estimator, ada.NormTest(eta=1e6) if policy is None else policy, part, **settings)

    def loss(batch: Any) -> Any:
        each = each_loss(model, batch)
        return ((each * batch[3]).sum(), batch[3]) if weighted else each.mean()

    decisions = train(engine, loss)
    return [d.observation.gradient for d in decisions]


def gradients_of(name: str, rows: Tensor) -> Tensor:
    """(n, d): every example's own gradient."""
    model, found = make(name), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for loss in each_loss(model, [tensor[rows] for tensor in make_data().tensors]):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


def expected(case: dict[str, Any], start: int) -> tuple[float, float]:
    """s of the step, and V of the measured examples of all ranks around their own mean."""
    rows = SampleOrder(203, seed=5).indices(start, STEP)
    weights = make_data().tensors[3][rows] if case.get("weighted") else torch.ones(STEP, dtype=torch.float64)
    g = gradients_of(case.get("model", "layers"), rows)
    mean = (weights[:, None] * g).sum(0) / weights.sum()
    part = case.get("max_examples", STEP)
    w = weights[:part] / weights[:part].sum()
    centre = (w[:, None] * g[:part]).sum(0)
    spread = float((w * (g[:part] - centre).square().sum(1)).sum())
    return float(mean.square().sum()), spread / (1 - float(w.square().sum()))


def per_example(rank: int, ranks: int) -> Any:
    cases = {name: case for name, case in CASES.items() if ranks == 4 or case.get("shard") != "replicas"}
    return {name: measured(case, ada.PerExample()) for name, case in cases.items()}


@pytest.mark.parametrize("ranks", [2, 4])
def test_per_example(ranks: int) -> None:
    results = on_ranks(ranks, per_example, ranks)
    for name, records in results[0].items():
        assert all(other[name] == records for other in results)
        assert len(records) == STEPS
        for number, record in enumerate(records):
            s, v = expected(CASES[name], number * STEP)
            assert record.kind == "per_example"
            assert record.num_examples == STEP
            assert record.num_units == CASES[name].get("max_examples", STEP), name
            assert record.grad_norm_sq == pytest.approx(s, rel=1e-10), name
            assert record.variance_trace == pytest.approx(v, rel=1e-10), name
