"""Small models, data and policies that the tests of the engine share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.core.mixing import seed_for
from adadagrad.core.records import Observation
from adadagrad.policies.base import AbstractPolicy

WHOLE = os.environ.get("ADADAGRAD_SLOW") == "1"
"""Whether the long forms run; otherwise reduced ones do."""

TIMES = ("seconds", "measure_seconds", "time")
"""Keys of run.jsonl that a clock has written."""


@dataclass(frozen=True, slots=True)
class Sizes(AbstractPolicy):
    """Sizes that grow and shrink pseudo-randomly, as a pure function of the samples seen."""

    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[bool] = False
    largest: int = 40
    seed: int = 0

    def required_batch_size(self, observation: Observation) -> float:
        return 1.0 + seed_for(self.seed, observation.samples_seen) % self.largest


@dataclass(frozen=True, slots=True)
class Asks(AbstractPolicy):
    """A test that reads V and answers with what a function makes of the record; asked once about a step."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})
    monotone: ClassVar[bool] = False
    answer: Callable[[Observation], float]
    answers: dict[int, float] = field(default_factory=dict)

    def required_batch_size(self, observation: Observation) -> float:
        if observation.samples_seen not in self.answers:
            self.answers[observation.samples_seen] = self.answer(observation)
        return self.answers[observation.samples_seen]


def doubling(observation: Observation) -> float:
    return 2.0 * (observation.global_batch_size or 1)


class Recording(torch.optim.SGD):
    """SGD that keeps the gradient and the parameters of every update as it saw them."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr)
        self.gradients: list[Tensor] = []
        self.before: list[list[Tensor]] = []
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> None:
        params = self.param_groups[0]["params"]
        self.gradients.append(torch.cat([p.grad.flatten() for p in params]).clone())
        self.before.append([p.detach().clone() for p in params])
        self.rates.append(self.param_groups[0]["lr"])
        super().step()


class Failing(Recording):
    """The same; its update fails while `fail` is set."""

    fail = False

    def step(self, closure: Any = None) -> None:
        if self.fail:
            raise RuntimeError("no")
        super().step(closure)


def make_data(n: int = 203, inputs: int = 5, classes: int = 3, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Noisy classification data, with the row's number as a third column and a weight as a fourth."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, inputs, generator=generator, dtype=dtype)
    y = x @ torch.randn(inputs, classes, generator=generator, dtype=dtype)
    y = (y + torch.randn(n, classes, generator=generator, dtype=dtype)).argmax(1)
    weight = torch.randint(1, 9, (n,), generator=generator).to(dtype)
    return TensorDataset(x, y, torch.arange(n), weight)


def make_model(dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 7), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(7, 3)]
    return nn.Sequential(*layers).to(dtype)


def mean_loss(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def losses_of(data: TensorDataset, rows: Tensor) -> Callable[[nn.Module], Tensor]:
    """The loss of each of some examples, for the naive statistics."""
    x, y = data.tensors[:2]
    return lambda model: F.cross_entropy(model(x[rows]), y[rows], reduction="none")


@torch.no_grad()
def put(model: nn.Module, values: list[Tensor]) -> nn.Module:
    """Set a model's parameters."""
    for p, value in zip(model.parameters(), values, strict=True):
        p.copy_(value)
    return model


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def make_engine(model: nn.Module, optimizer: Any = None, data: Any = None, policy: Any = None, **options: Any) -> Any:
    """An engine with small sizes; whatever is not named has a default here."""
    optimizer = Recording(model.parameters()) if optimizer is None else optimizer
    data = make_data() if data is None else data
    policy = ada.NormTest(eta=0.5) if policy is None else policy
    if getattr(policy, "needs", ()):
        options.setdefault("global_batch_size", 4)
    if "epochs" not in options:
        options.setdefault("total_samples", 700)
    options.setdefault("micro_batch_size", 16)
    return ada.AdaptiveBatch(model, optimizer, data, policy, **options)


def train(engine: Any, loss: Any = None, steps: int | None = None) -> list[Any]:
    """Run an engine, to its end or for some steps, and return its decisions."""
    decisions: list[Any] = []
    if steps == 0:
        return decisions
    for step in engine:
        step.run(mean_loss(engine.model) if loss is None else loss)
        decisions.append(step.update())
        if len(decisions) == steps:
            break
    return decisions


def read_log(directory: Path) -> list[dict[str, Any]]:
    """The records of a run directory, without what a clock wrote."""
    lines = (Path(directory) / "run.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def patched(model: nn.Module) -> list[str]:
    """Names of the modules that carry a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]
