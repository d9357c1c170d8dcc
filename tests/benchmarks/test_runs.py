"""A run says what it promises, repeats, and is not trained twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, UnknownName
from benchmarks import runs
from benchmarks.methods import METHODS, arguments
from benchmarks.runs import Config
from benchmarks.tasks import TASKS, Task

TASK = replace(TASKS["digits"], budget=1000)
KEYS = {
    *("machine", "version", "task", "budget", "optimizer", "lr", "method", "seed", "split", "steps", "samples"),
    *("mean_batch", "diverged", "metric", "loss", "accuracy", "train_loss", "cpu_seconds", "measuring_seconds"),
    *("curve", "progress", "batch_sizes", "learning_rates"),
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A run sets torch's number of threads; what comes after it is not to notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if not key.endswith("seconds")}
    return kept | {"curve": [(samples, steps, metric) for samples, steps, _, metric in result["curve"]]}


def test_a_result_has_the_promised_keys() -> None:
    result = runs.train(Config(TASK, "sgd", 0.1, "constant 8"), "")
    assert set(result) == KEYS
    assert (result["steps"], result["samples"], result["mean_batch"]) == (125, 1000, 8.0)
    assert result["metric"] == result["accuracy"] > 0.5
    assert not result["diverged"]
    assert 0 <= result["measuring_seconds"] <= result["cpu_seconds"]
    assert [samples for samples, *_ in result["curve"]] == [-(-50 * k // 8) * 8 for k in range(1, 21)]
    assert result["progress"] == [samples for samples, *_ in result["curve"]]
    assert result["curve"][-1][3] == result["metric"]  # 359 images, all of them
    assert result["batch_sizes"][:2] == [(0, 8), (16, 8)]  # every second of 125
    assert result["learning_rates"][0] == (0, 0.1)
    assert result["learning_rates"][-1][1] < 1e-4  # the cosine's end
    assert len(result["learning_rates"]) == 63


def test_a_batch_larger_than_the_spacing_of_evaluations() -> None:
    result = runs.train(Config(TASK, "adamw", 0.01, "constant 300"), "")
    assert [point[:2] for point in result["curve"]] == [(300, 1), (600, 2), (900, 3), (1000, 4)]


def test_the_same_seed_repeats_and_another_does_not() -> None:
    config = Config(TASK, "adagrad", 0.03, "norm 0.5", seed=1)
    first, again, other = (runs.train(c, "") for c in (config, config, replace(config, seed=2)))
    assert timeless(first) == timeless(again)
    assert first["loss"] != other["loss"]
    assert first["measuring_seconds"] > 0
    assert first["batch_sizes"][0] == (0, TASK.base_batch_size)
    assert first["batch_sizes"][-1][1] > TASK.base_batch_size


def zeros() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    return model


def test_the_seed_is_also_that_of_the_order() -> None:
    config = Config(replace(TASK, make=zeros), "sgd", 0.1, "constant 64")
    assert runs.train(config, "")["loss"] != runs.train(replace(config, seed=1), "")["loss"]


def test_the_other_split_is_another_result() -> None:
    config = Config(TASK, "sgd", 0.1, "constant 64")
    val, test = (runs.train(replace(config, split=split), "") for split in ("val", "test"))
    assert val["learning_rates"] == test["learning_rates"]
    assert val["loss"] != test["loss"]


def test_divergence_is_a_result(tmp_path: Path) -> None:
    result = runs.train(Config(TASK, "sgd", 1e30, "constant 8"), "")
    assert result["diverged"]
    assert result["metric"] is result["loss"] is result["accuracy"] is None
    assert result["samples"] < 1000
    json.dumps(result, allow_nan=False)


def test_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(task: Task, optimizer: str, first: float, second: float) -> dict[str, Any]:
        return {"found": (task.name, optimizer, first, second)}

    assert arguments("constant 64", TASK, "sgd") == {"policy": ada.ConstantBatch(64)}
    assert arguments("norm 0.25", TASK, "sgd") == {"policy": ada.NormTest(eta=0.25), "global_batch_size": 16}
    monkeypatch.setitem(METHODS, "two", two)
    assert arguments("two 1 0.5", TASK, "sgd") == {"found": ("digits", "sgd", 1.0, 0.5)}
    with pytest.raises(UnknownName, match="unknown method 'norms': did you mean norm"):
        arguments("norms 0.5", TASK, "sgd")
    with pytest.raises(InvalidArgument, match=r"method must be a word and numbers, as in .*, got 'norm half'"):
        arguments("norm half", TASK, "sgd")


def test_keys_tell_all_runs_apart() -> None:
    config = Config(TASK, "sgd", 0.0316, "norm 0.5", seed=3)
    assert config.key == f"digits-1000-sgd-lr-0.0316-norm-0.5-seed-3-val-v{runs.VERSION}"
    changes: list[dict[str, Any]] = [
        *({"task": TASKS["digits"]}, {"optimizer": "adamw"}, {"lr": 0.1}, {"method": "norm 0.25"}),
        *({"seed": 4}, {"split": "test"}),
    ]
    assert len({config.key, *(replace(config, **change).key for change in changes)}) == 7


def test_an_interrupted_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(config: Config, folder: str) -> dict[str, Any]:
        trained.append(config.seed)
        if len(trained) == 2:
            raise RuntimeError("stopped")
        return {"seed": config.seed, "metric": None, "steps": 1234, "cpu_seconds": 0.26}

    def pool(workers: int, **_: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", pool)
    configs = [Config(TASK, "sgd", 0.1, "constant 64", seed) for seed in range(3)]
    with pytest.raises(RuntimeError, match="stopped"):
        runs.run_all(configs, "", 1, "study")
    assert [result["seed"] for result in runs.run_all(configs, "", 1, "study")] == [0, 1, 2]
    assert trained.count(0) == 1
    assert trained.count(1) == 2
    assert f"{configs[0].key}: diverged, 1,234 steps, 0.3 CPU s" in capsys.readouterr().out
    assert len(list(Path("results/study").iterdir())) == 3
    before = len(trained)
    runs.run_all(configs[::-1], "", 1, "study")
    assert len(trained) == before


def test_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(replace(TASK, budget=200), "sgd", 0.1, "constant 64")
    (found,) = runs.run_all([config], "", 1, "study")
    here = json.loads(json.dumps(runs.train(config, "")))
    assert timeless(found) == timeless(here)
