"""The study of defaults tunes on validation, reports on test, and answers its three questions by arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import defaults
from benchmarks.defaults import CHOOSING_SEED, PAPER, WINNER, Study, table_row
from benchmarks.runs import Config
from benchmarks.tasks import TASKS


def result(metric: float | None, steps: int, seconds: float) -> dict[str, Any]:
    return {"metric": metric, "steps": steps, "cpu_seconds": seconds}


class Fake:
    """Stands for `run_all`: remembers what it was asked for and answers by a rule."""

    def __init__(self, rule: Any) -> None:
        self.rule, self.asked = rule, list[Config]()

    def __call__(self, configs: Any, folder: str, jobs: int, out: str) -> list[dict[str, Any]]:
        self.asked += configs
        return [self.rule(config) for config in configs]


def rule(config: Config) -> dict[str, Any]:
    """The middle rate is best everywhere; constant 64 is the best constant, and short budgets are worse."""
    middle = config.lr == config.task.learning_rates[config.optimizer][1]
    known = {
        "constant 16": (0.960, 3200, 2.0),
        "constant 64": (0.970, 800, 1.0),
        "constant 256": (0.940, 200, 0.5),
        PAPER: (0.900, 50, 0.4),
        WINNER: (0.968, 100, 0.6),
    }
    metric, steps, seconds = known[config.method]
    short = config.task.budget < TASKS["digits"].budget
    metric += 0.002 * (config.seed % 2) - (0 if middle else 0.5) - (0.02 if short else 0)
    return result(metric, steps, seconds)


def run(monkeypatch: pytest.MonkeyPatch, answer: Any = rule, seeds: int = 4) -> tuple[Fake, str]:
    fake = Fake(answer)
    monkeypatch.setattr(defaults, "run_all", fake)
    study = Study(TASKS["digits"], "sgd", "nowhere", 1, seeds)
    return fake, table_row(study, *study.run())


def test_rates_are_chosen_on_validation_with_one_seed_and_everything_else_is_on_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, _ = run(monkeypatch)
    choosing = [c for c in fake.asked if c.split == "val"]
    reporting = [c for c in fake.asked if c.split == "test"]
    assert len(choosing) == 5 * 3
    assert {c.seed for c in choosing} == {CHOOSING_SEED}
    assert CHOOSING_SEED not in {c.seed for c in reporting}
    assert {c.lr for c in reporting} == {TASKS["digits"].learning_rates["sgd"][1]}
    whole = [c for c in reporting if c.task == TASKS["digits"]]
    assert sorted({(c.method, c.seed) for c in whole}) == sorted(
        (method, seed) for method in ("constant 16", "constant 64", "constant 256", PAPER, WINNER) for seed in range(4)
    )
    assert {c.task.budget for c in reporting} == {53900, 26950, 13475}


def test_the_row_compares_with_the_constant_that_validation_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    _, row = run(monkeypatch)
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    assert cells == [
        "digits, sgd",
        "64: 0.9710 ± 0.0012",
        "800",
        "0.9010 ± 0.0012",
        "50",
        "0.9690 ± 0.0012",
        "100",
        "8.0",
        "1.0",
        "0.6",
        "1.0",  # constant 64 is the only one as good, and takes longer
        "no",  # 0.002 worse, where two runs differ by 0.0016
        "yes",
        "yes",
    ]


@pytest.mark.parametrize(
    ("metric", "steps", "seconds", "answers"),
    [
        (0.9695, 100, 0.6, ["yes", "yes", "yes"]),
        (0.9695, 101, 0.6, ["yes", "no", "yes"]),
        (0.9695, 100, 1.1, ["yes", "yes", "no"]),
        (0.9590, 100, 1.1, ["no", "yes", "no"]),
        (0.99, 100, 9.0, ["yes", "yes", "yes"]),  # no constant batch is as good
        (None, 100, 0.6, ["no", "yes", "no"]),  # every constant batch is better than a run that diverged
    ],
)
def test_three_questions(
    monkeypatch: pytest.MonkeyPatch, metric: float | None, steps: int, seconds: float, answers: list[str]
) -> None:
    def other(config: Config) -> dict[str, Any]:
        found = rule(config)
        if config.method == WINNER:
            shift = found["metric"] - 0.968
            found |= {"metric": None if metric is None else metric + shift, "steps": steps, "cpu_seconds": seconds}
        return found

    _, row = run(monkeypatch, other)
    assert [cell.strip() for cell in row.strip("| ").split("|")][-3:] == answers


def test_a_loss_is_better_when_it_is_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(config: Config) -> dict[str, Any]:
        sizes = {"constant 8": 2.1, "constant 32": 2.0, "constant 128": 2.2, PAPER: 2.5, WINNER: 2.0}
        return result(sizes[config.method] + 0.001 * (config.seed % 2), 10, 1.0)

    monkeypatch.setattr(defaults, "run_all", Fake(lower))
    study = Study(TASKS["gpt"], "adamw", "nowhere", 1, 2)
    row = table_row(study, *study.run())
    assert "| 32: 2.0005" in row
    assert row.endswith("| yes | no | no |")


def test_the_picture_is_a_png_with_a_panel_for_each_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(defaults, "run_all", Fake(rule))
    path = tmp_path / "defaults.png"
    defaults.main(["--data", "nowhere", "--tasks", "digits", "--optimizers", "sgd", "--picture", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
