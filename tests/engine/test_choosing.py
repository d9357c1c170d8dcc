"""``estimator="auto"`` in the engine: exact first, a probe where that pays, the same again on resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import adadagrad as ada
from adadagrad.statistics import choosing


@pytest.fixture(autouse=True)
def no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "MARGIN", 1.0)


def engine(size: int = 8, **options: Any) -> ada.AdaptiveBatch:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 48, 256, generator=generator, dtype=torch.float64)
    y = torch.randn(64, 48, 256, generator=generator, dtype=torch.float64)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.001)
    options = {"measure": ada.Measure(every=1), **options}
    data = torch.utils.data.TensorDataset(x, y)
    return ada.AdaptiveBatch(
        model, optimizer, data, ada.NormTest(eta=100.0), global_batch_size=size, total_samples=8 * size, **options
    )


def run(of: ada.AdaptiveBatch, steps: int) -> list[ada.Decision]:
    decisions = []
    for step in of:
        step.run(lambda batch: (of.model(batch[0]) - batch[1]).square().mean())
        decisions.append(step.update())
        if len(decisions) == steps:
            break
    return decisions


def kinds(decisions: list[ada.Decision]) -> list[str | None]:
    return [d.observation.gradient and d.observation.gradient.kind for d in decisions]


def test_sizes_come_with_the_first_step_and_the_choice_with_the_second() -> None:
    assert kinds(run(engine(), 4)) == ["per_example", "probe", "probe", "probe"]


def test_a_named_estimator_stays() -> None:
    named = ada.Measure(every=1, estimator=ada.PerExample())
    assert kinds(run(engine(measure=named), 3)) == ["per_example"] * 3


def test_a_resumed_run_goes_on_with_the_same_estimator() -> None:
    first, second = engine(), engine()
    run(first, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.measuring.estimator == ada.Probe()
    went_on = run(first, 3)
    assert run(second, 3) == went_on
    assert set(kinds(went_on)) == {"probe"}
