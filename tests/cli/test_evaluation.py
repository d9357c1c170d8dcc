"""Evaluation gives the mean over all held-out data, on time, and leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from adadagrad.cli import evaluation
from adadagrad.cli.evaluation import Evaluator


class Noisy(Dataset[Any]):
    """Draws from the global random state, as an augmenting data set does."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3), index % 2


def test_accuracy_and_loss_are_means_over_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(25, 3), torch.randint(0, 4, (25,))
    model = nn.Linear(3, 4)
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH_SIZE", 10)  # 10, 10 and 5 examples
    metrics = Evaluator(TensorDataset(inputs, labels), "test", 100, 10)(model)
    logits = model(inputs)
    assert metrics["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert metrics["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_accuracy_does_not_depend_on_a_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake 12 of the published code: normalised by the evaluation batch, accuracy depends on that batch's size."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(60, 3).cumsum(0), torch.randint(0, 4, (60,))
    data = TensorDataset(inputs, labels)

    def found(size: int, running: bool) -> dict[str, float]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=running), nn.Linear(3, 4))
        model(inputs)
        monkeypatch.setattr(evaluation, "EVALUATION_BATCH_SIZE", size)
        return Evaluator(data, "val", 100, 10)(model)

    assert evaluation.EVALUATION_BATCH_SIZE == 1000  # whatever the training's batch
    whole = found(60, running=True)
    for size in (7, 20):
        assert found(size, running=True)["val/accuracy"] == whole["val/accuracy"]
        assert found(size, running=True)["val/loss"] == pytest.approx(whole["val/loss"], rel=1e-6)
        assert abs(found(size, running=False)["val/loss"] - found(60, running=False)["val/loss"]) > 0.01


def test_no_trace_in_modes_gradients_or_random_states() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[1].eval()  # frozen by the user: must stay so
    before = torch.get_rng_state(), random.getstate()
    evaluate = Evaluator(Noisy(), "val", 100, 10)
    evaluate(model)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert [module.training for module in model] == [True, False, True]
    assert all(p.grad is None for p in model.parameters())


def test_modes_come_back_after_an_error() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError):
        Evaluator(Noisy(), "val", 100, 10)(model)
    assert model.training


@pytest.mark.parametrize("size", [1, 7, 30, 64, 1000])
def test_evaluations_are_even_in_samples_and_end_with_the_run(size: int) -> None:
    evaluate = Evaluator(Noisy(), "val", 900, 30)
    marks = list(range(0, 900, size))
    due = [min(mark + size, 900) for mark in marks if evaluate.is_due(mark, min(mark + size, 900))]
    assert due[-1] == 900
    assert len(due) == min(30, len(marks))
    assert due[:3] == {1: [30, 60, 90], 7: [35, 63, 91], 30: [30, 60, 90], 64: [64, 128, 192], 1000: [900]}[size]
