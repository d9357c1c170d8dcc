"""Every mistake on the command line is one line that names the flag, and leaves no trace."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from adadagrad.cli import main

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _full(folder: Path) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "run.jsonl").write_text('{"kind": "start"}\nbroken\n{"kind": "end"}\n')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tran"],
            "unknown command 'tran': did you mean train? known: compare, completion, detect, federated, measure, "
            "perturb, report, train, watch",
        ),
        (["train", "--policy", "nrom"], "unknown policy 'nrom': did you mean norm"),
        (["train", "--model", "mpl"], "unknown model 'mpl': did you mean mlp"),
        (["train", "--optimizer", "adagard"], "unknown optimizer 'adagard': did you mean adagrad"),
        (["train", "--data", "digit"], "unknown data 'digit': did you mean digits"),
        (["train", "--data", "json:loads"], "--data json:loads is called without arguments, but needs s"),
        (["train", "--data", "mnist:nowhere"], "nowhere is not a folder"),
        (["train", "--data", "mnist:full"], "full holds neither train-images-idx3-ubyte nor"),
        (["train", "--policy", "norm", "--eta", "0"], "--eta must be > 0, got 0.0"),
        (["train", "--policy", "norm", "--eta", "nan"], "--eta must be > 0, got nan"),
        (["train", "--max-batch-size", "32"], "--max-batch-size must be >= --global-batch-size, got --max"),
        (["train", "--micro-batch-size", "0"], "--micro-batch-size must be >= 1, got 0"),
        (["train", "--policy", "constant", "--global-batch-size", "5000"], "--global-batch-size must not exceed"),
        (["train", "--max-growth", "0.5"], "--max-growth must be > 1, got 0.5"),
        (["train", "--confidence", "0.3"], "--confidence must be > 0.5 and < 1, for example 0.9, got 0.3"),
        (["train", "--confidence", "0.9", "--global-batch-size", "2"], "--global-batch-size must be >= 3 for"),
        (["train", "--confidence", "0.9", "--max-examples", "2"], "takes 3 examples, got --max-examples 2"),
        (["train", "--epochs", "0"], "--epochs must be > 0, got 0"),
        (["train", "--samples", "-5"], "--samples must be >= 1, got -5"),
        (["train", "--evaluations", "0"], "--evaluations must be >= 1, got 0"),
        (["train", "--threads", "-1"], "--threads must be >= 0, got -1"),
        (["train", "--seed", str(2**63)], "--seed must be a 64-bit integer"),
        (["train", "--lr", "inf"], "--lr must be >= 0, got inf"),
        (["train", "--measure-every", "0"], "--measure-every must be >= 1, got 0"),
        (["train", "--device", "nonsense"], "--device nonsense cannot be used here: "),
        (["train", "--policy", "staged"], "--stages must be given with --policy staged"),
        (["train", "--config", "none.toml"], "--config none.toml cannot be read"),
        (["train", "--out", "full"], "--out full is not an empty folder"),
        (["train", "--resume", "--out", "full"], "full holds no config.toml"),
        (["compare", "--out", "full"], "--out full is not an empty folder"),
        (["compare", "--samples", "200"], "--large-batch-size must not exceed the 200 examples"),
        (["compare", "--small-batch-size", "0"], "--small-batch-size must be >= 1, got 0"),
        (["compare", "--eta", "-1"], "--eta must be > 0, got -1.0"),
        (["watch", "full", "--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["report", "nowhere"], "nowhere does not exist"),
        (["report", "full"], "full/run.jsonl, line 2: not a record"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_trace(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    _full(folder)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("adadagrad: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err + output.out
    assert not list(folder.glob("runs/*"))
    assert [path.name for path in (folder / "full").iterdir()] == ["run.jsonl"]


def test_a_disk_that_is_full_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(self: Path, *arguments: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["train", "--samples", "64", "--out", "run"]) == 2
    assert capsys.readouterr().err == (
        "adadagrad: run/config.toml: No space left on device: make room, or choose another --out\n"
    )
