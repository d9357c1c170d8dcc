"""The synthetic problem is what it says, and each row has its own learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.reproduce.divebatch import TASK, main, methods, synthetic
from benchmarks.runs import Config
from tests.benchmarks.reproduce.made_up import made_up, pretend


def test_the_problem_is_linear_and_its_parts_are_disjoint() -> None:
    parts = synthetic("")
    assert [len(part) for part in parts] == [14_000, 3_000, 3_000]
    inputs, labels = parts.train.tensors
    assert inputs.shape == (14_000, 512)
    assert (float(inputs.min()), float(inputs.max())) == pytest.approx((-1, 1), abs=1e-3)
    assert 0.48 < float(labels.float().mean()) < 0.52
    solved = torch.linalg.lstsq(inputs, 2.0 * labels[:, None] - 1).solution
    test_inputs, test_labels = parts.test.tensors
    right = ((test_inputs @ solved)[:, 0] > 0).long() == test_labels
    assert float(right.float().mean()) > 0.93
    assert not any(torch.equal(test_inputs[0], row) for row in inputs[:100])


def test_rows_of_both_tasks() -> None:
    assert list(methods(TASK["synthetic"])) == [
        *("flat 128", "flat 2048", "adabatch 14000 20", "divebatch-none 0.1", "divebatch-linear 0.1")
    ]
    assert list(methods(TASK["digits"]))[:3] == ["flat 16", "flat 256", "adabatch 1078 20"]


def test_each_row_has_its_own_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    low, *_, high = TASK["synthetic"].learning_rates["plain-sgd"]

    def make(config: Config) -> dict[str, Any]:
        return made_up(config, 0.9 if config.lr == (low if "divebatch" in config.method else high) else 0.1)

    asked = pretend(monkeypatch, make)
    main(["--parts", "synthetic", "--seeds", "1"])
    tested = {config.method: config.lr for _, config in asked if config.split == "test"}
    assert tested["flat 128"] == tested["adabatch 14000 20"] == high
    assert tested["divebatch-none 0.1"] == low
    assert f"| DiveBatch | {low:g} | 0.0000 | 0.0000 | 0 | 0 | 0.0 | not at hand |" in capsys.readouterr().out
