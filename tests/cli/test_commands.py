"""The commands from end to end, in this process, on few samples of real data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adadagrad.cli import main
from adadagrad.cli import train as train_module
from adadagrad.cli.progress import PlainProgress
from adadagrad.core.records import Decision
from adadagrad.report.reader import read_run
from tests.cli.mnist_folder import write_mnist
from tests.cli.runs import CONSTANT, MEASURED, PLAIN, SHORT, records
from tests.report.logs import small_run, write

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_leaves_a_whole_run_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SHORT, "--out", "here"]) == 0
    assert {path.name for path in Path("here").iterdir()} == {
        "config.toml",
        "run.jsonl",
        "checkpoint.pt",
        "report.html",
    }
    run = read_run("here")
    assert run.end is not None
    assert run.steps[-1].samples_seen == 600
    assert sum(step.global_batch_size for step in run.steps) == 600
    assert run.steps[-1].global_batch_size > 16 or run.steps[-2].global_batch_size > 16
    assert 5 <= len(run.series("val/accuracy")) <= 30
    assert run.logs[-1].samples_seen == 600
    output = capsys.readouterr()
    assert "best" in output.out
    assert "validation" in output.out
    assert "report: here" in output.out
    last_line = next(line for line in output.err.splitlines() if " 100% " in line)
    assert f"acc {run.logs[-1].metrics['val/accuracy']:.3f}" in last_line


def test_the_same_seed_gives_the_same_log_and_another_seed_another() -> None:
    for name, seed in (("one", "3"), ("two", "3"), ("three", "4")):
        assert main(["train", *SHORT, "--seed", seed, "--out", name]) == 0
    assert records(Path("one")) == records(Path("two"))
    assert records(Path("one"))[1:] != records(Path("three"))[1:]


def test_evaluating_more_often_changes_nothing_else() -> None:
    main(["train", *SHORT, "--evaluations", "1", "--out", "few"])
    main(["train", *SHORT, "--evaluations", "30", "--out", "many"])
    few, many = ([r for r in records(Path(name)) if r["kind"] == "step"] for name in ("few", "many"))
    assert few == many


def test_config_of_a_run_repeats_it() -> None:
    main(["train", *SHORT, "--lr", "0.02", "--out", "first"])
    assert main(["train", "--config", "first/config.toml", "--out", "again"]) == 0
    assert records(Path("first")) == records(Path("again"))
    assert Path("first/config.toml").read_text() == Path("again/config.toml").read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        CONSTANT,
        [*MEASURED, "--policy", "inner-product"],
        [*MEASURED, "--policy", "augmented"],
        [*MEASURED, "--policy", "coordinate"],
        [*PLAIN, "--policy", "staged", "--stages", "0:16 100:32"],
        [*PLAIN, "--policy", "geometric", "--global-batch-size", "16", "--every-samples", "200"],
        [*PLAIN, "--policy", "linear", "--global-batch-size", "16", "--end-batch-size", "64", "--ramp-samples", "300"],
    ],
    ids=lambda arguments: arguments[arguments.index("--policy") + 1],
)
def test_every_policy_trains(arguments: list[str]) -> None:
    assert main(["train", *arguments, "--out", "run"]) == 0
    assert read_run("run").steps[0].global_batch_size == 16


@pytest.mark.parametrize("optimizer", ["adagrad", "adagrad-norm", "sgd", "adam", "adamw"])
def test_every_optimizer_trains(optimizer: str) -> None:
    more = ["--optimizer", optimizer, "--lr-schedule", "cosine", "--max-grad-norm", "1"]
    assert main(["train", *SHORT, *more, "--out", "run"]) == 0


def test_mnist_in_a_folder_is_evaluated_as_test(folder: Path) -> None:
    write_mnist(folder / "mnist", train=60, test=10)
    arguments = ["--data", "mnist:mnist", "--model", "cnn", "--samples", "64", "--global-batch-size", "8"]
    assert main(["train", *arguments, "--out", "run"]) == 0
    assert "test/accuracy" in read_run("run").logs[-1].metrics


NAMES = ("constant-8", "constant-200", "paper-norm", "recommended")


def test_a_rate_that_counts_progress_itself_ends_evaluates_and_shows_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The gain is below the scale, so that more samples are used than the budget names."""
    more = ["--policy", "staged", "--stages", "0:16 64:128", "--rate", "adascale", "--measure-every", "1"]
    assert main(["train", "--data", "digits", "--samples", "600", *more, "--out", "run"]) == 0
    run = read_run("run")
    assert run.end is not None
    assert run.steps[-1].samples_seen > 700
    assert 5 <= len(run.series("val/accuracy")) <= 30
    assert " 100% " in capsys.readouterr().err
    assert main(["train", "--resume", "--out", "run", "--samples", "900"]) == 0
    assert read_run("run").steps[-1].samples_seen > run.steps[-1].samples_seen


def test_compare_trains_four_ways_on_equal_samples(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--samples", "800", "--small-batch-size", "8", "--large-batch-size", "200", "--global-batch-size", "8"]
    assert main(["compare", *arguments]) == 0
    runs = [read_run(Path("runs/compare-001") / name) for name in NAMES]
    assert [run.steps[-1].samples_seen for run in runs] == [800, 800, 800, 800]
    assert [len(run.steps) for run in runs[:2]] == [100, 4]
    assert 4 <= len(runs[2].steps) < 100
    assert 4 <= len(runs[3].steps) <= 100
    assert (runs[2].start["rate"], runs[3].start["rate"]) == (None, "LinearScaling(base_batch_size=None)")
    out = capsys.readouterr().out
    assert all(name in out for name in (*NAMES, "validation"))
    page = Path("runs/compare-001/report.html").read_text()
    assert page.count("<svg") == 7
    assert page.count("<details>") == 4


def test_report_of_runs_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", *SHORT, "--out", "a"])
    whole = Path("a/run.jsonl").read_bytes()
    Path("b").mkdir()
    Path("b/run.jsonl").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert main(["report", "a", "b", "-o", "both.html"]) == 0
    assert "b: stopped before its end" in capsys.readouterr().out
    assert "stopped before its end" in Path("both.html").read_text()
    assert main(["report", "b"]) == 0
    assert Path("b/report.html").is_file()
    assert main(["report", "a", "-o", "a"]) == 2
    assert "--out a cannot be written: Is a directory" in capsys.readouterr().err


def test_report_leaves_a_broken_log_out_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("runs/good"), small_run())
    write(Path("runs/empty"), [])
    assert main(["report", "runs"]) == 2
    output = capsys.readouterr()
    assert "adadagrad: left out, runs/empty/run.jsonl, line 1: no start record" in output.err
    assert "good" in output.out
    assert Path("runs/report.html").is_file()
    assert main(["report", "runs/empty"]) == 2
    assert capsys.readouterr().out == ""


def test_without_the_report_extra_the_run_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["train", *SHORT, "--out", "run"]) == 0
    assert "no report: jinja2 is not installed: pip install 'adadagrad[report]'" in capsys.readouterr().err
    assert read_run("run").end is not None


DIVERGING = [*CONSTANT, "--optimizer", "sgd", "--lr", "1e30"]


def test_a_run_that_diverges_stops_with_its_step_and_stays_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *DIVERGING, "--on-nonfinite", "stop", "--out", "run"]) == 2
    message = capsys.readouterr().err
    assert "gradient of step" in message
    assert "pass --on-nonfinite skip to leave such steps out" in message
    run = read_run("run")
    assert run.skipped == 1
    assert main(["report", "run"]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "usage: adadagrad COMMAND"),
        (["--help"], 0, "usage: adadagrad COMMAND"),
        (["--version"], 0, "adadagrad 0."),
    ],
)
def test_help_and_version(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, text: str) -> None:
    assert main(arguments) == status
    assert text in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "compare", "measure", "report"])
def test_help_of_each_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: adadagrad {command}" in text
    if command != "report":
        own = ("--checkpoint", "--samples") if command == "measure" else ("--policy", "--eta")
        for flag in ("--data", "--model", "--lr", "--seed", "--out", "--config", *own):
            assert flag in text


def test_unknown_flags_are_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--etta", "0.1"])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert "--eta" in output.err + output.out


def test_keyboard_interrupt_outside_a_run_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Callable[..., int]:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "load_data", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "adadagrad: interrupted\n"


@pytest.mark.parametrize(("more", "threads"), [([], 1), (["--threads", "2"], 2)])
def test_threads_are_set_for_the_run_and_given_back(
    monkeypatch: pytest.MonkeyPatch, more: list[str], threads: int
) -> None:
    during: list[int] = []

    class Looks(PlainProgress):
        def step(self, decision: Decision) -> None:
            during.append(torch.get_num_threads())

    monkeypatch.setattr(train_module, "progress_display", Looks)
    before = torch.get_num_threads()
    assert main(["train", *SHORT, *more, "--out", "run"]) == 0
    assert set(during) == {threads}
    assert torch.get_num_threads() == before
