"""AdaScale's tables stand beside the published numbers, and deviations are of equal progress."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.reproduce.adascale import between, deviation, main, progress_at, samples_at
from benchmarks.runs import Config
from benchmarks.tasks import TASKS
from tests.benchmarks.reproduce.made_up import made_up, pretend

CNN = TASKS["cnn"]


def test_the_table_of_accuracies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    low, _, _ = CNN.learning_rates["sgd"]
    asked = pretend(monkeypatch, lambda config: made_up(config, 0.9 if config.lr == low else 0.1))
    main(["--parts", "cnn", "--seeds", "2"])
    assert {config.method for _, config in asked[:3]} == {"constant 16"}
    tested = [(config.seed, config.method, config.lr, config.split) for _, config in asked[3:]]
    assert tested[:3] == [
        (0, "constant 16", low, "test"),
        (0, "scaled-gain 8", low, "test"),
        (0, "scaled-linear 8", low, "test"),
    ]
    assert [seed for seed, *_ in tested] == [0] * 9 + [1] * 9
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| 8 |"))
    assert row.startswith("| 8 | 128 | 0.5000 ± 0.7071 / 0.5000 ± 0.7071 |")
    assert row.endswith("| 94.1 / 94.0 | 5.85k / 4.88k | .153 / .161 |")
    assert next(line for line in lines if line.startswith("| 1 |")).endswith("| 94.1 | 39.1k | .157 |")


def test_the_table_of_losses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = pretend(monkeypatch)
    main(["--parts", "gpt", "--seeds", "1"])
    assert {config.optimizer for _, config in asked} == {"adamw"}
    assert [config.method for _, config in asked[3:5]] == ["constant 8", "scaled-root-gain 4"]
    assert "| 16 | linear | 0.0000 | 0 | 0.0000 | 0 | not at hand |" in capsys.readouterr().out


def test_between() -> None:
    assert [between([1, 3], [10, 20], x) for x in (0, 1, 2.5, 3, 4)] == [10, 10, 17.5, 20, 20]


def test_deviations_are_of_equal_progress_after_the_start() -> None:
    def run(*points: tuple[float, float]) -> dict[str, Any]:
        return {"progress": [at for at, _ in points], "curve": [(0, 0, 0.0, loss) for _, loss in points]}

    others = [run((10, 4.0), (20, 2.0)), run((10, 6.0), (20, 4.0))]  # mean 5, 4 at 15, 3
    assert deviation(run((10, 9.0), (15, 4.5), (20, 1.0)), others, start=10) == (1.25, 2.0)


def test_elastic_runs_change_at_a_quarter_and_a_half(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(config: Config) -> dict[str, Any]:
        moved = [(s, k, t, loss + config.seed / 10) for s, k, t, loss in made_up(config)["curve"]]
        return made_up(config, curve=moved)

    asked = pretend(monkeypatch, make)
    main(["--parts", "elastic", "--seeds", "2"])
    methods = {config.method for _, config in asked if config.task.name == "cnn-loss"}
    quarter = CNN.budget // 4  # the run at S = 16 uses 2 samples for 1 of progress
    counted = f"elastic-gain 16 4 {quarter} {3 * quarter}"
    assert methods == {"constant 16", counted, f"elastic-linear 16 4 {quarter} {2 * quarter}"}
    assert {config.split for _, config in asked if config.method.startswith(("elastic", "constant"))} == {"val"}
    assert {config.task.metric for _, config in asked if config.method.startswith("elastic")} == {"loss"}
    out = capsys.readouterr().out
    assert "| S = 1 | 0.5000 ± 0.7071 | 0.1000 ± 0.0000 | 0.1000 ± 0.0000 | - |" in out
    assert "| gain, S = 1, 16, 4 | 0.5000 ± 0.7071 | 0.1000 ± 0.0000 | 0.1000 ± 0.0000 | 0.375 ± 0.000 |" in out


def test_samples_and_progress_are_read_off_the_curve() -> None:
    run = made_up(Config(CNN, "sgd", 0.1, "constant 16"))  # 2 samples for 1 of progress
    assert samples_at(run, CNN.budget / 2) == 2 * (CNN.budget // 2)
    assert progress_at(run, 2 * (CNN.budget // 4)) == CNN.budget // 4


def test_nothing_trained_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--show"])
    assert "| 64 | 1024 | - / - |" in capsys.readouterr().out
