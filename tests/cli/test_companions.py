"""Every optimizer from the command line: trains on the digits, goes on after a stop, alone and on many ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from adadagrad.cli import main
from adadagrad.cli import train as train_module
from adadagrad.cli.building import make_engine
from adadagrad.cli.config import BatchOptions, OptimizerOptions, Settings
from adadagrad.cli.data import load_data
from adadagrad.cli.optimizers import OPTIMIZERS
from adadagrad.report.reader import read_run
from tests.cli.runs import CONSTANT, MEASURED, records
from tests.cli.test_resume import PressesCtrlC
from tests.ranks import on_ranks

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)

LEARNING_RATES = {
    **{"adagrad": "0.05", "adagrad-norm": "5", "sgd": "0.1", "adam": "0.005", "adamw": "0.005", "mars": "0.01"},
    **{"mars-m": "0.02", "madam": "0.005", "lamadam": "0.005", "adarankgrad": "0.01", "sift": "0.05"},
    **{"extrapolated-sgd": "0.1", "extrapolated-adam": "0.005"},
    **{"adagrad-ota": "0.02", "adam-ota": "0.005"},
}
MORE = {
    "mars": ["--mars-mode", "exact", "--gamma", "0.1"],
    "adarankgrad": ["--max-rank", "8"],
    "sift": ["--sift-rate", "0.1"],
    "extrapolated-sgd": ["--momentum", "0.9", "--extrapolation", "0.5"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports, which are drawn for seconds, are looked at in other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_module, "write_report", lambda runs, path: path)


def of(name: str) -> list[str]:
    return ["--optimizer", name, "--lr", LEARNING_RATES[name], *MORE.get(name, [])]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_trains_stops_and_goes_on_as_if_nothing_had_been(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the recommended policy, which measures, and changes the batch and the rate."""
    run = [*MEASURED, *of(name), "--samples", "3000"]
    assert main(["train", *run, "--out", "whole"]) == 0
    losses = [step.loss for step in read_run("whole").steps]
    assert sum(losses[-5:]) < (0.97 if name == "sift" else 0.8) * sum(losses[:5])  # few of its entries move
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "progress_display", PressesCtrlC)
        assert main(["train", *run, "--out", "run"]) == 130
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert records(Path("run")) == records(Path("whole"))
    ours, theirs = (torch.load(f"{path}/checkpoint.pt")["engine"]["model"] for path in ("run", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("mars", "gamma", 0.0),
        ("mars", "mars_variant", "lion"),
        ("mars-m", "mars_mode", "exact"),
        ("adarankgrad", "max_rank", 3),
        ("sift", "sift_rate", 0.5),
        ("extrapolated-sgd", "perturb", "filter"),
        ("extrapolated-sgd", "momentum", 0.5),
        ("extrapolated-adam", "extrapolation", 3.0),
        ("adam-ota", "power", 1.1),
        ("adagrad-ota", "power", 1.1),
    ],
)
def test_options_reach_the_optimizer(name: str, option: str, value: Any) -> None:
    found = []
    for chosen in ({}, {option: value}):
        settings = Settings(
            optimizer=OptimizerOptions(optimizer=name, rate="none", **chosen), batch=BatchOptions(policy="constant")
        )
        engine = make_engine(settings, load_data("digits"), None)
        for step in engine:
            step.run(lambda batch, model=engine.model: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]))  # type: ignore[misc]
            step.update()
            if engine.steps == 4:
                break
        found.append(torch.cat([p.detach().flatten() for p in engine.model.parameters()]))
    assert not torch.equal(*found)


def test_nonsense_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--optimizer", "adam-ota", "--power", "1"], "--power must be above 1 and at most 2, got 1.0"),
        (["--optimizer", "sift", "--sift-rate", "2"], "--sift-rate must be above 0 and at most 1, got 2.0"),
        (["--optimizer", "adarankgrad", "--max-rank", "0"], "--max-rank must be >= 1"),
        (["--optimizer", "mars", "--gamma", "-1"], "gamma must be >= 0"),
        (["--optimizer", "madam", "--gamma", "0.1"], "--gamma is not used with --optimizer madam"),
        (["--optimizer", "lamadm"], "unknown optimizer 'lamadm': did you mean lamadam"),
    ):
        assert main(["train", *CONSTANT, *arguments, "--out", "refused"]) == 2
        assert message in capsys.readouterr().err
        assert not Path("refused").exists()


def of_rank(rank: int, folder: str) -> list[int]:
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    train_module.write_report = lambda runs, path: path  # type: ignore[assignment]
    return [main(["train", *CONSTANT, *of(name), "--out", f"{name}-2"]) for name in sorted(OPTIMIZERS)]


def test_many_ranks_train_with_every_optimizer(tmp_path: Path) -> None:
    assert on_ranks(2, of_rank, str(tmp_path)) == [[0] * len(OPTIMIZERS)] * 2
    for name in sorted(OPTIMIZERS):
        assert main(["train", *CONSTANT, *of(name), "--out", f"{name}-1"]) == 0
        one, two = (read_run(f"{name}-{ranks}").steps[-1].loss for ranks in (1, 2))
        if name != "extrapolated-sgd":  # two workers of it are displaced each by its own
            assert one == pytest.approx(two, rel=0.1 if name in ("mars-m", "adarankgrad") else 1e-3)
