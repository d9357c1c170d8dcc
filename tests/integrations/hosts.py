"""One small task for every host, and what the plain engine makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import adadagrad as ada

SETTINGS: dict[str, Any] = {
    "global_batch_size": 16,
    "micro_batch_size": 24,
    "epochs": 3,
    "measure": ada.Measure(every=1),
    "max_grad_norm": 1.0,
    "lr_schedule": ada.CosineSchedule(),
}


def policy() -> ada.NormTest:
    return ada.NormTest(eta=0.35)


def make_data(dtype: torch.dtype = torch.float32) -> TensorDataset:
    inputs = torch.randn(600, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(inputs.to(dtype), (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long())


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=0.1)


def mean_loss(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def train(engine: ada.AdaptiveBatch, model: nn.Module, steps: int = 10**9) -> list[tuple[int, float]]:
    """Train, and return what each step took and found."""
    trace: list[tuple[int, float]] = []
    for step in engine:
        step.run(mean_loss(model))
        decision = step.update()
        trace.append((decision.plan.global_batch_size, float(decision.observation.loss or 0.0)))
        if len(trace) == steps:
            break
    return trace


def sizes(trace: list[tuple[int, float]]) -> list[int]:
    return [size for size, _ in trace]


def weights(engine: ada.AdaptiveBatch) -> Tensor:
    return torch.cat([p.detach().flatten() for p in engine.parallel.module.parameters()])


def plain(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[tuple[int, float]], Tensor]:
    """Train with the engine alone."""
    model = make_model(dtype)
    engine = ada.AdaptiveBatch(model, make_optimizer(model), make_data(dtype), policy(), **{**SETTINGS, **options})
    return train(engine, model), weights(engine)
