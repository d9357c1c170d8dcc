"""The ablation of learning-rate rules lists every rule at every fraction, and takes the best rate of each."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import rules
from benchmarks.methods import RULES
from benchmarks.rules import FRACTIONS, best, label, methods
from benchmarks.tasks import TASKS


def test_every_rule_is_tried_at_every_fraction() -> None:
    found = methods(TASKS["gpt"])
    assert found[:3] == ["constant 8", "constant 32", "constant 128"]
    assert len(found) == 3 + len(RULES) * len(FRACTIONS)
    assert "noise-linear 0.25 1.2" in found


def test_rows_have_the_same_name_on_every_task() -> None:
    assert label(TASKS["gpt"], "constant 32") == label(TASKS["logistic"], "constant 256") == "middle constant batch"
    assert label(TASKS["gpt"], "noise-root-gain 4 1.2") == "4 B, root-gain"


def test_the_best_is_the_lowest_loss_or_the_highest_accuracy() -> None:
    results = [{"metric": m, "steps": s} for m, s in ((0.5, 10), (None, 20), (0.75, 1234))]
    assert best(TASKS["digits"], results) == "0.7500 in 1,234"
    assert best(TASKS["gpt"], results) == "0.5000 in 10"
    assert best(TASKS["digits"], results[1:2]) == "diverged"


def test_the_table_has_a_column_for_each_task_and_optimizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_all(configs: Any, *_: Any) -> list[dict[str, Any]]:
        assert {config.split for config in configs} == {"val"}
        return [{"metric": 0.5 + config.lr, "steps": 7} for config in configs]

    monkeypatch.setattr(rules, "run_all", run_all)
    rules.main(["--data", "nowhere", "--tasks", "digits", "--optimizers", "sgd,adamw"])
    lines = capsys.readouterr().out.splitlines()
    highest = [TASKS["digits"].learning_rates[name][2] for name in ("sgd", "adamw")]
    assert "| batch, rule | digits, sgd | digits, adamw |" in lines
    assert f"| 1 B, linear | {0.5 + highest[0]:.4f} in 7 | {0.5 + highest[1]:.4f} in 7 |" in lines
