"""Runs that are stopped or killed, and continued as if nothing had been."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from adadagrad.cli import main
from adadagrad.cli import train as train_module
from adadagrad.cli.progress import PlainProgress
from adadagrad.core.records import Decision
from adadagrad.report.reader import read_run
from tests.cli.runs import CONSTANT, MEASURED, SHORT, records

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class PressesCtrlC(PlainProgress):
    """Sends a signal to this process in one step."""

    at = 20
    number = signal.SIGINT

    def step(self, decision: Decision) -> None:
        super().step(decision)
        if decision.step == self.at:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_resumes_as_if_nothing_had_been(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    main(["train", *MEASURED, "--policy", "inner-product", "--out", "whole"])
    before = signal.getsignal(number)
    monkeypatch.setattr(PressesCtrlC, "number", number)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "progress_display", PressesCtrlC)
        assert main(["train", *MEASURED, "--policy", "inner-product", "--out", "run"]) == 130
    assert signal.getsignal(number) is before
    assert "stopped: continue with adadagrad train --resume --out run" in capsys.readouterr().err
    stopped = read_run("run")
    assert stopped.end is None
    assert stopped.steps[-1].step == 20
    assert Path("run/report.html").is_file()
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert records(Path("run")) == records(Path("whole"))
    ours, theirs = (torch.load(f"{name}/checkpoint.pt")["engine"]["model"] for name in ("run", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_killed_run_resumes_from_its_last_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(PlainProgress):
        def step(self, decision: Decision) -> None:
            if decision.step == 25:
                raise SystemExit(9)

    main(["train", *CONSTANT, "--out", "whole"])
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "progress_display", Killed)
        with pytest.raises(SystemExit):
            main(["train", *CONSTANT, "--out", "run"])
    with Path("run/run.jsonl").open("a") as log:
        log.write('{"kind": "step", "st')
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert records(Path("run")) == records(Path("whole"))


def test_ctrl_c_in_a_comparison_reports_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_module, "progress_display", PressesCtrlC)
    arguments = ["--samples", "800", "--small-batch-size", "8", "--large-batch-size", "200", "--out", "three"]
    assert main(["compare", *arguments]) == 130
    assert [path.name for path in sorted(Path("three").iterdir())] == ["constant-8", "report.html"]
    assert "constant-8: stopped before its end, at 160 of 800 samples" in capsys.readouterr().out


def test_a_run_cannot_be_continued_with_other_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint would override some of them, and config.toml would then say what was not so."""
    assert main(["train", *SHORT, "--out", "run"]) == 0
    before = (folder / "run" / "config.toml").read_bytes(), (folder / "run" / "run.jsonl").read_bytes()
    assert main(["train", "--resume", "--out", "run", "--lr", "0.5"]) == 2
    assert "--lr 0.5 cannot be changed on --resume" in capsys.readouterr().err
    assert ((folder / "run" / "config.toml").read_bytes(), (folder / "run" / "run.jsonl").read_bytes()) == before
    assert main(["train", "--resume", "--out", "run", "--samples", "599"]) == 2
    assert "has seen 600 samples, more than the budget of 599" in capsys.readouterr().err
    assert ((folder / "run" / "config.toml").read_bytes(), (folder / "run" / "run.jsonl").read_bytes()) == before
    assert main(["train", "--resume", "--out", "run", "--samples", "700"]) == 0
    assert read_run(folder / "run").steps[-1].samples_seen == 700
    (folder / "run" / "run.jsonl").unlink()
    assert main(["train", "--resume", "--out", "run", "--samples", "800"]) == 2
    assert "holds a checkpoint at 700 samples but no run.jsonl" in capsys.readouterr().err
