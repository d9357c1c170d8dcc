"""The recommended choice fits the optimizer, trains, and resumes exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.engine.recommended import DECAY, FRACTION, GROWTH, OVERHEAD, accumulator_memory
from tests.engine.cases import make_data, make_model, mean_loss, train

OPTIMIZERS: dict[str, tuple[Any, float | None]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), None),
    "adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.05), 1.0),
    "adagrad-norm": (lambda p: ada.AdaGradNorm(p, lr=0.05), 1.0),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99)), 0.99),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01), 0.999),
    "nadam": (lambda p: torch.optim.NAdam(p, lr=0.01), 0.999),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.97), 0.97),
}


def make(name: str, total_samples: int = 600, **options: Any) -> Any:
    model = make_model()
    optimizer = OPTIMIZERS[name][0](model.parameters())
    choice = {**ada.recommended(optimizer, global_batch_size=8), **options}
    return ada.AdaptiveBatch(
        model, optimizer, make_data(), **choice, total_samples=total_samples, lr_schedule=ada.CosineSchedule()
    )


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_it_fits_the_optimizer(name: str) -> None:
    optimizer = OPTIMIZERS[name][0](nn.Linear(2, 2).parameters())
    memory = OPTIMIZERS[name][1]
    choice = ada.recommended(optimizer, global_batch_size=32)
    assert choice["rate"] == ada.LinearScaling()
    assert choice["policy"] == ada.GradientNoiseScale(fraction=FRACTION, averaging=DECAY)
    assert (choice["global_batch_size"], choice["min_batch_size"]) == (32, 32)
    assert choice["bounds"].max_growth == GROWTH
    assert choice["measure"] == ada.Measure(max_overhead=OVERHEAD)
    if memory is None:
        with pytest.raises(InvalidArgument, match="accumulator of squared gradients, and SGD is not known as one"):
            accumulator_memory(optimizer)
    else:
        assert accumulator_memory(optimizer) == memory


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_it_trains_within_the_budget_and_the_floor(name: str) -> None:
    engine = make(name)
    decisions = train(engine)
    assert engine.samples_seen == 600
    assert min(d.plan.global_batch_size for d in decisions) == 8
    assert all(d.requested is None or d.requested > 0 for d in decisions)
    assert any(d.requested is not None for d in decisions)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adamw"])
@pytest.mark.parametrize("at", [5, 23])
def test_resuming_in_the_middle_is_exact(name: str, at: int, tmp_path: Any) -> None:
    whole = make(name)
    expected = train(whole)
    first = make(name)
    train(first, steps=at)
    first.save(tmp_path / "state.pt")
    second = make(name)
    second.load(tmp_path / "state.pt")
    rest = train(second)
    assert [(d.lr, d.requested, d.plan) for d in rest] == [(d.lr, d.requested, d.plan) for d in expected[at:]]
    for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"global_batch_size": 1}, "global_batch_size must be >= 2, got 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    with pytest.raises(InvalidArgument) as error:
        ada.recommended(**{"optimizer": optimizer, **arguments})
    assert message in str(error.value)


def test_the_learning_rate_of_the_first_batch_is_the_optimizers_own() -> None:
    engine = make("sgd")
    for step in engine:
        step.run(mean_loss(engine.model))
        decision = step.update()
        assert decision.lr == pytest.approx(0.1)  # gain 1 at the base batch, cosine 1 at the start
        break


def test_the_gradient_that_hovering_sgd_keeps_is_that_of_the_docstring() -> None:
    """Second moments m of the weights along three curvatures: m <- (1 - lr h)^2 m + lr^2 v / b, until they stay."""
    curvatures, variances, lr, batch_size = (0.2, 1.0, 3.0), (1.0, 2.0, 0.5), 0.6, 4
    moments = [0.0, 0.0, 0.0]
    for _ in range(2000):
        steps = zip(moments, curvatures, variances, strict=True)
        moments = [(1 - lr * h) ** 2 * m + lr**2 * v / batch_size for m, h, v in steps]
    found = batch_size * sum(h**2 * m for h, m in zip(curvatures, moments, strict=True)) / sum(variances)
    shares = [v / sum(variances) for v in variances]
    stated = sum(p * lr * h / (2 - lr * h) for p, h in zip(shares, curvatures, strict=True))
    assert found == pytest.approx(stated, rel=1e-12)
    small = lr * sum(p * h for p, h in zip(shares, curvatures, strict=True)) / 2  # what small lr h would leave
    assert found > 4 * small
