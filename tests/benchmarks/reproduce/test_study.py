"""A study takes the best learning rate, reports what is there, and its methods train as they are called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adadagrad as ada
from benchmarks import runs
from benchmarks.methods import arguments
from benchmarks.reproduce.study import Study, cell, of_method, options, table
from benchmarks.runs import Config
from benchmarks.tasks import TASKS
from tests.benchmarks.reproduce.made_up import made_up, pretend

TASK = replace(TASKS["digits"], budget=1600)
LOW, MIDDLE, HIGH = TASK.learning_rates["sgd"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A run sets torch's number of threads; what comes after it is not to notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("metric", "best"), [("accuracy", MIDDLE), ("loss", LOW)])
def test_the_best_rate_of_each_method_is_taken(monkeypatch: pytest.MonkeyPatch, metric: str, best: float) -> None:
    def make(config: Config) -> dict[str, Any]:
        found = {LOW: 0.4, MIDDLE: 0.6, HIGH: None}
        return made_up(config, found[config.lr] if config.method == "constant 16" else None)

    asked = pretend(monkeypatch, make)
    study = Study("name", "data")
    chosen = study.choose(replace(TASK, metric=metric), "sgd", ["constant 16", "constant 64"])
    assert chosen == {"constant 16": best}  # nothing of 64 ended
    assert [(out, config.lr, config.split, config.seed) for out, config in asked[:3]] == [
        ("name", lr, "val", 0) for lr in (LOW, MIDDLE, HIGH)
    ]


def test_show_reads_what_is_there_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [Config(TASK, "sgd", 0.1, "constant 16", seed) for seed in (0, 1)]
    Path("results/name").mkdir(parents=True)
    Path(f"results/name/{configs[1].key}.json").write_text(json.dumps(made_up(configs[1])))
    assert [result["seed"] for result in Study("name", "", show=True).results(configs)] == [1]


def test_cells_and_tables() -> None:
    found = [made_up(Config(TASK, "sgd", 0.1, "constant 16", seed)) for seed in (1, 2)]
    lost = made_up(Config(TASK, "sgd", 0.1, "constant 64", 3), None)
    assert cell(found, "loss", 2) == "1.50 ± 0.71"
    assert cell([*found, lost], "loss", 1) == "1.5 ± 0.7 (2 of 3)"
    assert cell([lost], "loss") == "diverged"
    assert cell([], "loss") == "-"
    assert of_method([*found, lost], "constant 64") == [lost]
    assert table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "|---|---|", "| 1 | 2 |"]


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    found = options("A study.\n", ["one", "two"], 3, ["--parts", "two"])
    assert (found.parts, found.seeds, found.jobs, found.show) == (["two"], 3, 1, False)
    assert "seeds 0 to 2, one thread a run" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        options("A study.\n", ["one"], 3, ["--seeds", "0"])
    assert "--seeds must be >= 1, got 0" in capsys.readouterr().err


def sizes(method: str, optimizer: str = "sgd") -> dict[int, int]:
    """Batch sizes by the samples before them, without repetition."""
    result = runs.train(Config(TASK, optimizer, 0.01, method), "")
    assert not result["diverged"]
    changes: dict[int, int] = {}
    for samples, size in result["batch_sizes"]:
        if not changes or size != list(changes.values())[-1]:
            changes[samples] = size
    return changes


def test_schedules_change_where_they_say() -> None:
    assert sizes("staged") == {0: 16, 400: 64, 848: 256}
    assert sizes("elastic-linear 8 4 400 800") == {0: 16, 400: 128, 912: 64}
    assert sizes("adabatch 400 2") == {0: 16, 800: 32}
    assert sizes("flat 64") == {0: 64}


@pytest.mark.parametrize("rule", ["gain", "root-gain", "accumulator"])
def test_measured_scaling_ends_at_the_budget_of_progress(rule: str) -> None:
    result = runs.train(Config(TASK, "adamw", 0.003, f"scaled-{rule} 4"), "")
    assert result["batch_sizes"][0] == (0, 64)
    assert TASK.budget <= result["progress"][-1] < TASK.budget + 64
    assert result["samples"] > TASK.budget
    lrs = [lr for _, lr in result["learning_rates"]]
    assert 0.003 < lrs[0] <= 4 * 0.003
    assert lrs[-1] < 0.001  # the cosine is read in progress


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4), ("sqrt", 2)])
def test_other_scaling_warms_up_and_ends_at_the_samples(rule: str, factor: int) -> None:
    result = runs.train(Config(replace(TASK, budget=6400), "sgd", 0.01, f"scaled-{rule} 4"), "")
    assert result["samples"] == result["progress"][-1] == 6400
    lrs = [lr for _, lr in result["learning_rates"]]
    assert lrs[0] == 0
    assert lrs[1] == pytest.approx(factor * 0.01 * 64 / (0.055 * 6400))
    assert 0.95 * factor * 0.01 < max(lrs) <= factor * 0.01


def test_cabs_and_divebatch_keep_their_bounds_and_their_rate() -> None:
    result = runs.train(Config(replace(TASK, budget=4000), "plain-sgd", 0.1, "cabs 16 20"), "")
    found = [size for _, size in result["batch_sizes"]]
    assert found[0] == 16
    assert set(found) <= set(range(16, 21))
    assert {lr for _, lr in result["learning_rates"]} == {0.1}
    task = replace(TASK, budget=3 * 1078)
    plain, scaled = (
        runs.train(Config(task, "plain-sgd", 0.1, f"divebatch-{rule} 1"), "") for rule in ("none", "linear")
    )
    assert {lr for _, lr in plain["learning_rates"]} == {0.1}
    assert plain["batch_sizes"][0] == (0, 16)
    assert 16 < plain["batch_sizes"][-1][1] <= 256
    last, lr = scaled["batch_sizes"][-2][1], scaled["learning_rates"][-2][1]  # the last step may be cut
    assert last > 16
    assert lr == pytest.approx(0.1 * last / 16)


def test_accumulators_forget_as_the_optimizer_does() -> None:
    assert arguments("scaled-accumulator 4", TASK, "adamw")["rate"] == ada.AccumulatorScale(0.999, base_batch_size=16)
    assert arguments("scaled-accumulator 4", TASK, "adagrad")["rate"].memory == 1.0
    assert arguments("scaled-gain 4", TASK, "sgd")["measure"] == ada.Measure(every=1, max_examples=128)
