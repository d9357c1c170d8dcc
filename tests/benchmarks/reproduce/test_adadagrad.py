"""The MNIST tables are of what they say: rows, seeds, budgets, and what they cost up to an accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adadagrad.core.errors import InvalidArgument
from benchmarks.reproduce import adadagrad
from benchmarks.reproduce.adadagrad import ROWS, main, rows_named
from benchmarks.reproduce.tables import read, spread, table_row
from benchmarks.reproduce.training import EXPERIMENTS, OPTIMIZERS, Run, evaluation_marks, train
from tests.cli.mnist_folder import write_mnist

BY_NAME = {row.name: row for row in ROWS}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The benchmark sets torch's number of threads; what comes after it is not to notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs that were asked for, in order; none is trained, its accuracy is 0.9 and a hundredth of its seed."""
    runs: list[Run] = []

    def train(run: Run) -> dict[str, Any]:
        runs.append(run)
        names = ("steps", "mean_batch", "last_batch", "samples", "seconds", "measuring")
        final = 0.9 + run.seed / 100
        curve = [(20, 2, 0.5, 0.5), (40, 4, 1.5, final)]
        return {**dict.fromkeys(names, float(run.seed)), "accuracy": final, "curve": curve}

    def pool(workers: int, **_: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adadagrad, "train", train)
    monkeypatch.setattr(adadagrad, "ProcessPoolExecutor", pool)
    write_mnist(tmp_path / "mnist", train=20, test=10)
    return runs


def test_seeds_rows_and_their_order_are_those_named(trained: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["--rows", "norm test, eta 0.5", "constant 64"]
    main(["--data", "mnist", "--samples", "40", "--seeds", "2", "--first-seed", "5", *rows])
    assert [(run.row.name, run.seed) for run in trained] == [
        ("norm test, eta 0.5", 5),
        ("norm test, eta 0.5", 6),
        ("constant 64", 5),
        ("constant 64", 6),
    ]
    assert {(run.lr, run.samples, run.validation) for run in trained} == {(8e-3, 40, 0)}
    out = capsys.readouterr().out
    assert "seeds 5 to 6" in out
    line = "| constant 64 | 6 ± 1 | 6 ± 1 | 6 ± 1 | 5.5 ± 0.7 | 5.5 ± 0.7 | 0.9550 ± 0.0071 | 4 ± 0 | 1.5 ± 0.0 | not"
    assert line in out
    written = json.loads(Path("results/adadagrad/logistic-adagrad-40/constant-64-seed-6.json").read_text())
    assert (written["row"], written["seed"], written["lr"], written["accuracy"]) == ("constant 64", 6, 8e-3, 0.96)
    assert [run["seed"] for run in read("logistic", "adagrad", 40)["constant 64"]] == [5, 6]
    Path("results/adadagrad/logistic-adagrad-40/norm-test-eta-0.5-seed-6.json").unlink()
    main(["--show", "--samples", "40"])
    out = capsys.readouterr().out
    assert line in out
    assert "seeds [5, 6]\n" in out
    assert out.endswith("only seeds [5]: norm test, eta 0.5\n")
    main(["--draw", "--samples", "40"])
    assert Path("results/adadagrad/logistic-adagrad-40.png").read_bytes().startswith(b"\x89PNG")


def test_without_samples_the_budget_is_the_table_s(trained: list[Run]) -> None:
    main(["--data", "mnist", "--seeds", "1", "--rows", "constant 64"])
    main(["--data", "mnist", "--seeds", "1", "--rows", "constant 64", "--model", "cnn"])
    assert [run.samples for run in trained] == [6_000_000, 600_000]


def test_learning_rates_are_judged_away_from_the_test_images(trained: list[Run]) -> None:
    main(["--data", "mnist", "--optimizer", "adagrad-norm", "--samples", "40", "--choose-lr"])
    assert [(run.lr, run.validation) for run in trained] == [(lr, 5000) for lr in adadagrad.TRIED]
    assert {(run.row.name, run.optimizer) for run in trained} == {("constant 64", "adagrad-norm")}
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist", "--seeds", "0"], "--seeds must be >= 1, got 0"),
        (["--data", "mnist", "--rows", "nothing"], "no such row"),
        (["--data", "mnist", "--optimizer", "adagrad-norm", "--rows", "weighted"], "no such row"),
        ([], "--data must name the folder"),
        (["--data", "mnist", "--model", "cnn", "--optimizer", "adagrad-norm"], "no learning rate is chosen for cnn"),
        (["--draw"], "results/ holds no run of logistic, adagrad, 6,000,000 samples"),
    ],
)
def test_a_wrong_option_is_named(
    arguments: list[str], message: str, trained: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
    assert not trained


def test_a_whole_name_is_one_row_and_a_part_is_several() -> None:
    assert [row.name for row in rows_named(["norm test, eta 0.5"], "adagrad")] == ["norm test, eta 0.5"]
    names = [row.name for row in rows_named(["eta 0.25", "norm test"], "adagrad")]
    assert names == [
        "norm test, eta 0.25",
        "norm test, eta 0.1",
        "norm test, eta 0.5",
        "norm test, eta 0.5, default settings",
    ]
    assert rows_named([], "adagrad") == ROWS
    assert {row.name for row in ROWS} - {row.name for row in rows_named([], "adagrad-norm")} == {
        "coordinate-wise, weighted, eta 0.5"
    }


def test_an_accuracy_that_some_seeds_reach_says_how_many() -> None:
    numbers = dict.fromkeys(("steps", "mean_batch", "last_batch", "seconds", "measuring", "accuracy"), 1.0)
    early, never = [(9, 30, 2.0, 0.97), (10, 40, 3.0, 0.5)], [(10, 40, 3.0, 0.96)]
    runs = [{"row": "a", "curve": curve, **numbers} for curve in (early, never)]
    assert table_row("cnn", runs).endswith("| 30 (1 of 2) | 2.0 (1 of 2) | not at hand |")
    assert table_row("cnn", runs[1:]).endswith("| - | - | not at hand |")
    assert spread([1.0], 2) == "1.00"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_trains(tmp_path: Path, row: adadagrad.Row) -> None:
    write_mnist(tmp_path, train=1100, test=20)
    run = Run(folder=str(tmp_path), model="logistic", optimizer="adagrad", lr=8e-3, row=row, samples=1200, seed=1)
    result = train(run)
    assert result["samples"] == 1200
    assert result["mean_batch"] == 1200 / result["steps"]
    samples, steps, seconds, accuracy = zip(*result["curve"], strict=True)
    assert (samples[-1], steps[-1], seconds[-1]) == (1200, result["steps"], result["seconds"])
    assert accuracy[-1] == result["accuracy"]
    assert 0 <= result["measuring"] < result["seconds"]
    assert list(seconds) == sorted(seconds)
    assert len(set(steps)) == len(steps)


@pytest.mark.parametrize("model", EXPERIMENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_models_train_with_both_optimizers_on_what_validation_leaves(
    tmp_path: Path, model: str, optimizer: str
) -> None:
    write_mnist(tmp_path, train=72, test=10)
    row = BY_NAME["constant 64"]
    run = Run(
        folder=str(tmp_path), model=model, optimizer=optimizer, lr=1e-2, row=row, samples=192, seed=1, validation=8
    )
    result = train(run)
    assert result["accuracy"] * 8 % 1 == 0
    assert [point[0] for point in result["curve"]] == [64, 128, 192]
    with pytest.raises(InvalidArgument, match="hold 63"):
        train(replace(run, validation=9))


def test_accuracy_is_taken_along_the_way(tmp_path: Path) -> None:
    write_mnist(tmp_path, train=100, test=10)
    row = BY_NAME["constant 64"]
    run = Run(folder=str(tmp_path), model="logistic", optimizer="adagrad", lr=8e-3, row=row, samples=3840, seed=1)
    assert [point[0] for point in train(run)["curve"]] == [64, *range(128, 3841, 128)]
    marks = evaluation_marks(3000)
    assert marks[:8] == [1, 3, 6, 12, 25, 50, 100, 200]
    assert marks[7:] == list(range(200, 3001, 100))
    assert evaluation_marks(1) == [1]
