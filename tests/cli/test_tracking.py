"""``train --track``: the trackers have what the log has, once, over stops, and never stand in the training's way."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adadagrad.cli import main, tracking
from adadagrad.cli import train as train_module
from adadagrad.cli.arguments import TrainCommand, parse
from adadagrad.report.reader import read_run
from tests.cli.runs import CONSTANT, records
from tests.cli.test_resume import PressesCtrlC
from tests.integrations.trackers import (
    Memory,
    mlflow_rows,
    prometheus_values,
    tensorboard_rows,
    trackio_rows,
    wandb_records,
    wandb_rows,
)

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp())  # read when trackio is imported
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Reports, which are drawn for seconds, are looked at in other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_module, "write_report", lambda runs, path: path)
    return tmp_path


def losses(run: str = "run") -> list[tuple[float, float]]:
    return [(step.samples_seen, step.loss or 0.0) for step in read_run(run).steps]


def test_tensorboard_and_prometheus_have_the_whole_run(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    assert main(["train", *CONSTANT, "--track", "tensorboard", "--track", "prometheus:nodes", "--out", "run"]) == 0
    rows = tensorboard_rows(Path("run/tensorboard"))
    assert rows["adadagrad/loss"] == losses()
    accuracy = {row.samples_seen: value for row, value in read_run("run").series("val/accuracy")}
    assert dict(rows["val/accuracy"]) == pytest.approx(accuracy, rel=1e-6)
    (file,) = Path("nodes").iterdir()
    assert file.name.startswith("adadagrad-run-")
    values = prometheus_values(file.read_text())
    assert values["adadagrad_samples_seen", (("run", "run"),)] == 600
    assert values["adadagrad_loss", (("run", "run"),)] == losses()[-1][1]
    assert "track" not in Path("run/config.toml").read_text()


def test_folders_and_files_where_none_is_named() -> None:
    pytest.importorskip("tensorboard")
    assert main(["train", *CONSTANT, "--track", "tensorboard:all", "--track", "prometheus", "--out", "run"]) == 0
    assert Path("run/metrics.prom").is_file()
    (place,) = Path("all").iterdir()
    assert len(tensorboard_rows(place)["adadagrad/loss"]) == len(losses())


def test_wandb_has_settings_and_axis(folder: Path) -> None:
    pytest.importorskip("wandb")
    assert main(["train", *CONSTANT, "--track", "wandb:digits", "--out", "run"]) == 0
    assert wandb_rows(folder / "run")["adadagrad/loss"] == losses()
    runs = [record.run for record in wandb_records(folder / "run") if record.HasField("run")]
    assert {(run.project, run.display_name) for run in runs} == {("digits", "run")}
    settings = {item.key: item.value_json for run in runs for item in run.config.update}
    assert settings["global_batch_size"] == "16"


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's use of SQLAlchemy
def test_a_stopped_run_goes_on_in_the_same_runs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("trackio")
    store = f"sqlite:///{folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    track = ["--track", "mlflow:digits", "--track", "trackio:cli-digits"]
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "progress_display", PressesCtrlC)
        assert main(["train", *CONSTANT, *track, "--out", "run"]) == 130
    assert main(["train", "--resume", *track, "--out", "run"]) == 0
    client = mlflow.MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert mlflow_rows(store, run.info.run_id)["adadagrad/loss"] == losses()
    assert (run.info.run_name, run.info.status, run.data.params["policy"]) == ("run", "FINISHED", "constant")
    key = Path("run/tracked/key").read_text().strip()
    assert trackio_rows("cli-digits", key)["adadagrad/loss"] == losses()


def test_after_a_kill_the_steps_trained_again_are_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(PressesCtrlC):
        def step(self, decision: Any) -> None:
            if decision.step == 25:
                raise SystemExit(9)

    memory = Memory()
    monkeypatch.setattr(tracking, "TRACKERS", {"memory": lambda run: memory})
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "progress_display", Killed)
        with pytest.raises(SystemExit):
            main(["train", *CONSTANT, "--track", "memory", "--out", "run"])
    assert memory.closed == 1
    sent = len(memory.calls)
    assert main(["train", "--resume", "--track", "memory", "--out", "run"]) == 0
    steps = [(step, seen) for step, seen, numbers in memory.calls if "adadagrad/loss" in numbers]
    assert steps == [(r["step"], r["samples_seen"]) for r in records(Path("run")) if r["kind"] == "step"]
    assert 0 < sent < len(memory.calls)


@pytest.mark.parametrize("fails", ["log", "close"])
def test_a_tracker_that_fails_is_named_once_and_the_run_is_whole(
    fails: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Memory):
        def log(self, metrics: Mapping[str, float], *, samples_seen: int, step: int) -> None:
            if fails == "log":
                raise ConnectionError("no\nroute")

        def close(self) -> None:
            if fails == "close":
                raise ConnectionError("no route")

    monkeypatch.setattr(tracking, "TRACKERS", {"broken": lambda run: Broken()})
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 0.0)
    assert main(["train", *CONSTANT, "--track", "broken", "--out", "run"]) == 0
    assert read_run("run").end is not None
    said = [line for line in capsys.readouterr().err.splitlines() if "--track" in line]
    assert said == [
        "adadagrad: --track broken fails, training goes on: no route"
        if fails == "log"
        else "adadagrad: --track broken could not be closed: no route"
    ]


@pytest.mark.parametrize(
    ("track", "message"),
    [
        (["tensorbord"], "unknown tracker 'tensorbord': did you mean tensorboard"),
        (["mlflow", "mlflow:two"], "--track mlflow is given twice: name each tracker once"),
        (["wandb"], "wandb is not installed: pip install 'adadagrad[wandb]'"),
        (["tensorboard", "wandb"], "wandb is not installed: pip install 'adadagrad[wandb]'"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_trace(
    track: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    arguments = [word for name in track for word in ("--track", name)]
    assert main(["train", *CONSTANT, *arguments, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("run").exists()


def test_the_flag_is_repeated() -> None:
    command = parse("train", TrainCommand(), ["--track", "mlflow", "--track", "prometheus:here"])
    assert command.files.track == ("mlflow", "prometheus:here")
    assert parse("train", TrainCommand(), []).files.track == ()
