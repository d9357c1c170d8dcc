"""Data and models that cannot work are refused before training, by flag and in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from adadagrad.cli import main
from adadagrad.cli.data import DataSource
from adadagrad.cli.fit import check_data, check_fit
from adadagrad.core.errors import AdadagradError

GOOD = TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))


def source(train: Any, held_out: Any = GOOD) -> DataSource:
    return DataSource(name="task:load", train=train, held_out=held_out, split="val")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


class Raises(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        raise OSError("no disk")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "int has no length: give a map-style data set"),
        (None, "NoneType has no length"),
        (Stream(), "Stream has no length"),
        ([], "are empty"),
        (DataLoader(GOOD), "are a DataLoader: return the data set itself"),
        ("abc", "must hold pairs \\(input tensor, class number\\), got str"),
        ([1, 2], "must hold pairs .* got int"),
        (TensorDataset(torch.zeros(4, 3)), "must hold pairs .* got tuple of 1"),
        ([{"x": 1, "y": 0}], "must hold pairs .* got dict"),
        ([("image", 0)], "an input must be a tensor, got str"),
        ([(torch.zeros(3), "cat")], "a label must be a class number, got str"),
        (TensorDataset(torch.zeros(4, 3), torch.zeros(4)), r"of torch\.int64, got torch\.float32 of shape \(4,\)"),
        (TensorDataset(torch.zeros(4, 3), torch.zeros(4, 2).long()), r"got torch\.int64 of shape \(4, 2\)"),
        (TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, -1, 0])), "class numbers 0, 1, ..., got -1"),
        (Raises(), r"asked for example 0, raised OSError: no disk \(test_fit\.py, line \d+\)"),
    ],
)
@pytest.mark.parametrize("part", ["training", "validation"])
def test_data_that_is_no_classification(data: Any, message: str, part: str) -> None:
    pair = (data, GOOD) if part == "training" else (GOOD, data)
    with pytest.raises(AdadagradError, match=f"--data task:load: the {part} data.*{message}"):
        check_data(source(*pair))


class Pair(nn.Linear):
    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs), 1


class Single(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)[:, 0]


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (lambda: nn.Linear(3, 2).requires_grad_(False), source(GOOD), "--model task:net has no parameter that"),
        (lambda: nn.Linear(3, 1), source(GOOD), "returns 1 logits an example, .* give the model 2 outputs"),
        (lambda: nn.Linear(7, 2), source(GOOD), r"inputs of shape \(2, 3\) and torch.float32, raised RuntimeError"),
        (lambda: Pair(3, 2), source(GOOD), r"must return logits \(n, classes\), got tuple of 2"),
        (lambda: Single(3, 2), source(GOOD), r"must return logits .* got torch\.float32 of shape \(2,\)"),
        (lambda: nn.Linear(3, 2).double(), source(GOOD), "raised RuntimeError: .*dtype"),
        (
            lambda: nn.Linear(3, 2),
            source(GOOD, TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 0, 7]))),
            "given validation inputs .* go up to 7: give the model 8 outputs",
        ),
        (
            lambda: nn.Linear(3, 2),
            source(GOOD, TensorDataset(torch.zeros(4, 5), torch.tensor([0, 1, 0, 1]))),
            "given validation inputs .* raised RuntimeError",
        ),
        (lambda: nn.Linear(3, 2), source([(torch.zeros(3), 0), (torch.zeros(4), 0)]), "joining training examples"),
    ],
)
def test_a_model_that_does_not_fit(make: Callable[[], nn.Module], data: DataSource, message: str) -> None:
    with pytest.raises(AdadagradError, match=message):
        check_fit(make(), "task:net", data)


def test_the_check_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    check_fit(model, "task:net", source(GOOD))
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


LATE = """
import torch

class Late(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 30:
            raise KeyError("row 30")
        return torch.zeros(3), 0

def load():
    return Late(), [(torch.zeros(3), 0)]

def net():
    return torch.nn.Linear(3, 2)
"""


def test_own_code_that_fails_while_training_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late_task.py").write_text(LATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    task = ["--data", "late_task:load", "--model", "late_task:net", "--global-batch-size", "4"]
    assert main(["train", *task, "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert "while training, raised KeyError: 'row 30' (late_task.py, line 10)" in said
    assert "Traceback" not in said
    monkeypatch.setenv("ADADAGRAD_TRACEBACK", "1")
    assert main(["train", *task, "--out", "again"]) == 2
    assert "Traceback" in capsys.readouterr().err
