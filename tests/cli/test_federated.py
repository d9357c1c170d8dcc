"""``adadagrad federated``: it learns, every flag changes something, and mistakes are one line that leaves no trace."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adadagrad.cli import main
from tests.cli.neighbours import page_of, rows_of

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)

SHORT = ["--clients", "8", "--rounds", "6", "--evaluations", "2"]


OWN = """
from torch import nn
def make(outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))
def frozen():
    return make(10).requires_grad_(False)
def narrow():
    return make(3)
def halved():
    return make(10).bfloat16()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "neighbours_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "neighbours_own", raising=False)
    return tmp_path


def weights(out: str, *arguments: str) -> torch.Tensor:
    assert main(["federated", *SHORT, *arguments, "--out", out]) == 0
    model = torch.load(Path(out) / "server.pt", weights_only=True)["model"]
    return torch.cat([value.flatten() for value in model.values()])


def test_it_learns_and_leaves_rows_model_settings_and_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = ["--noise-scale", "0.01", "--clients", "10", "--rounds", "40", "--lr", "0.05"]
    assert main(["federated", *quiet, "--follow-tail", "--drop-out", "0.1", "--out", "run"]) == 0
    rows = rows_of(Path("run"))
    assert [row["round"] for row in rows] == list(range(1, 41))
    accuracy = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    assert len(accuracy) == 20
    assert accuracy[-1] > 0.75
    lost = sum(len(row["left_out"]) for row in rows)
    assert 10 < lost < 80
    assert all(row["answered"] + len(row["left_out"]) == row["asked"] == 10 for row in rows)
    assert rows[-1]["tail_index"] is not None
    assert f"last accuracy {accuracy[-1]:.3f}" in capsys.readouterr().out
    assert (Path("run") / "left-out.log").read_text().count("is left out: no message") == lost
    assert json.loads((Path("run") / "settings.json").read_text())["drop_out"] == 0.1
    page = page_of(Path("run"))
    assert "Estimated tail index" in page
    assert f"<td>{lost}</td>" in page


def test_the_same_twice() -> None:
    assert torch.equal(weights("one"), weights("two"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "mlp"],
        ["--concentration", "10"],
        ["--tail-index", "1.9"],
        ["--noise-scale", "0"],
        ["--fading", "none"],
        ["--noise-on", "sum"],
        *([["--server", name] for name in ("adagrad-ota", "fedavg", "fedavgm", "adagrad", "adam")]),
        ["--lr", "0.1"],
        ["--power", "2"],
        ["--message", "drift"],
        ["--message", "drift", "--local-epochs", "2"],
        ["--message", "drift", "--local-lr", "0.01"],
        ["--message", "drift", "--local-batch-size", "16"],
        ["--share", "0.5"],
        ["--drop-out", "0.5"],
        ["--seed", "1"],
    ],
    ids=" ".join,
)
def test_a_flag_changes_the_weights(arguments: list[str]) -> None:
    drifting = arguments[:2] == ["--message", "drift"] and len(arguments) > 2
    base = weights("base", *(arguments[:2] if drifting else []))
    other = weights("other", *arguments)
    assert base.shape != other.shape or not torch.equal(base, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tail-index", "1"], "--tail-index must be above 1 and at most 2, got 1.0"),
        (["--tail-index", "nan"], "--tail-index must be above 1 and at most 2, got nan"),
        (["--power", "2.5"], "--power must be above 1 and at most 2, got 2.5"),
        (["--noise-scale", "-1"], "--noise-scale must be >= 0, got -1.0"),
        (["--clients", "0"], "--clients must be >= 1, got 0"),
        (["--clients", "5000"], "--clients must be at most the 1437 examples there are, got 5000"),
        (["--concentration", "0"], "--concentration must be > 0, got 0.0"),
        (["--server", "adamota"], "unknown server 'adamota': did you mean adam-ota"),
        (["--server", "fedavg", "--power", "2"], "--power is not used here: leave it out, or choose --server adam-ota"),
        (["--server", "sgd"], "unknown server 'sgd'"),
        (["--local-lr", "1"], "--local-lr is not used here: leave it out, or choose --message drift"),
        (["--message", "drift", "--local-lr", "-1"], "--local-lr must be > 0, got -1.0"),
        (["--noise-scale", "0", "--tail-index", "1.2"], "--tail-index is not used here"),
        (["--seed", "9" * 25], "--seed must be below 2**63"),
        (["--model", "neighbours_own:frozen"], "has no parameter that requires a gradient"),
        (["--model", "neighbours_own:narrow"], "class numbers of --data digits go up to 9: give the model 10 outputs"),
        (["--model", "neighbours_own:halved"], "neighbours_own:halved, given training inputs of shape"),
        (["--lr", "1e300", "--rounds", "2"], "--model logistic, in training, raised"),
        (["--share", "0"], "--share must be above 0 and at most 1, got 0.0"),
        (["--drop-out", "2"], "--drop-out must be between 0 and 1, got 2.0"),
        (["--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["--lr", "-1"], "--lr must be >= 0, got -1.0"),
        (["--data", "digit"], "unknown data 'digit': did you mean digits"),
        (["--message", "drift", "--local-batch-size", "0"], "--local-batch-size must be >= 1, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["federated", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_weights_that_are_not_finite_any_more_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--server", "fedavg", "--lr", "1e38", "--rounds", "30", "--clients", "5", "--noise-scale", "10"]
    assert main(["federated", *arguments, "--out", "run"]) == 2
    assert "the weights are not finite any more: lower --lr" in capsys.readouterr().err
    rows = rows_of(Path("run"))
    assert len(rows) < 30
    assert rows[-1]["accuracy"] is not None


def test_ctrl_c_leaves_what_was_done(folder: Path) -> None:
    command = [sys.executable, "-m", "adadagrad", "federated", "--rounds", "1000000", "--out", "run"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "run").is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    rows = rows_of(folder / "run")
    assert rows
    assert rows[-1]["accuracy"] is not None
    assert f"{len(rows)} rounds, last accuracy" in out
