"""What was logged is read back by each library's own reader, with samples seen as the x axis."""

from __future__ import annotations

import math
import os
import stat
import tempfile
from pathlib import Path

import pytest

from adadagrad.core.errors import InvalidArgument
from adadagrad.integrations.trackers import MLflow, Prometheus, TensorBoard, Tracker, Trackio, WandB
from tests.integrations.trackers import (
    mlflow_rows,
    prometheus_values,
    same,
    tensorboard_rows,
    trackio_rows,
    wandb_records,
    wandb_rows,
)

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read when trackio is imported
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}

LOSS = [(64, 2.5), (128, math.nan), (256, 1.25)]
"""Samples and loss of three steps, of 64, 64 and 128 examples; the second was skipped, say."""
ACCURACY = [(128, 0.5)]
STEPS = [(64, 1.0), (128, 2.0), (128, 2.0), (256, 3.0)]


def log_all(tracker: Tracker) -> None:
    for step, (seen, loss) in enumerate(LOSS, start=1):
        tracker.log({"adadagrad/loss": loss}, samples_seen=seen, step=step)
        if step == 2:
            tracker.log({"val/accuracy": 0.5}, samples_seen=seen, step=step)
    tracker.close()
    tracker.close()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log_all(TensorBoard(tmp_path / "run"))
    rows = tensorboard_rows(tmp_path / "run")
    assert same(rows["adadagrad/loss"], LOSS)
    assert rows["val/accuracy"] == ACCURACY
    assert rows["adadagrad/step"] == STEPS
    again = TensorBoard(tmp_path / "run")
    again.log({"adadagrad/loss": 1.0}, samples_seen=512, step=4)
    again.close()
    assert same(tensorboard_rows(tmp_path / "run")["adadagrad/loss"], [*LOSS, (512, 1.0)])


def test_tensorboard_is_flushed_as_often_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import writer

    given = []
    monkeypatch.setattr(writer, "SummaryWriter", lambda place, flush_secs: given.append((place, flush_secs)))
    TensorBoard(tmp_path)
    TensorBoard(str(tmp_path), flush_seconds=3)
    assert given == [(tmp_path, 10), (tmp_path, 3)]


def test_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    log_all(WandB("digits", run_id="key1", config={"lr": 0.1}, dir=tmp_path, name="first"))
    rows = wandb_rows(tmp_path)
    assert same(rows["adadagrad/loss"], LOSS)
    assert rows["val/accuracy"] == ACCURACY
    assert rows["adadagrad/step"] == STEPS
    records = wandb_records(tmp_path)
    axes = {
        record.metric.name or record.metric.glob_name: record.metric.step_metric
        for record in records
        if record.HasField("metric")
    }
    assert axes.pop("samples_seen") == ""
    assert axes["*"] == "samples_seen"
    assert set(axes.values()) == {"samples_seen"}  # old versions write down each name as well
    (run,) = {(r.run.project, r.run.run_id, r.run.display_name) for r in records if r.HasField("run")}
    assert run == ("digits", "key1", "first")
    settings = {item.key: item.value_json for r in records if r.HasField("run") for item in r.run.config.update}
    assert settings["lr"] == "0.1"


def test_wandb_says_why_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuses(**options: object) -> None:
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuses)
    with pytest.raises(
        InvalidArgument, match=r"wandb\.init refuses: no API key: log in with wandb login, or set WANDB_"
    ):
        WandB("digits", dir=tmp_path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An MLflow store that is there already: to make its tables takes some seconds."""
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")  # MLflow's use of SQLAlchemy
def test_mlflow(store: str) -> None:
    from mlflow import MlflowClient

    tracker = MLflow("digits", tracking_uri=store, run_name="first", run_key="it's", config={"lr": 0.1})
    tracker.log({"early": math.inf}, samples_seen=32, step=0)
    assert mlflow_rows(store, tracker.run_id) == {}  # kept back
    log_all(tracker)
    rows = mlflow_rows(store, tracker.run_id)
    assert same(rows["adadagrad/loss"], LOSS)
    assert rows["val/accuracy"] == ACCURACY
    assert set(rows["adadagrad/step"]) == {(32, 0.0), *STEPS}  # of two equal ones MLflow keeps one
    assert rows["early"][0][1] > 1e308
    client = MlflowClient(tracking_uri=store)
    run = client.get_run(tracker.run_id)
    assert (run.info.run_name, run.info.status, run.data.params) == ("first", "FINISHED", {"lr": "0.1"})
    assert client.get_experiment(run.info.experiment_id).name == "digits"

    at_once = MLflow("digits", tracking_uri=store, run_key="it's", flush_seconds=0, config={"lr": 0.2})
    at_once.log({"more": 1.0}, samples_seen=512, step=4)
    assert at_once.run_id == tracker.run_id
    assert mlflow_rows(store, tracker.run_id)["more"] == [(512, 1.0)]
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    at_once.close()
    assert MLflow("digits", tracking_uri=store, run_key="other").run_id != tracker.run_id
    assert client.get_run(tracker.run_id).data.params == {"lr": "0.1"}
    with pytest.raises(InvalidArgument, match=r"^MLflow refuses: .*: check tracking_uri and experiment$"):
        MLflow("digits", tracking_uri="nonsense://here")
    with pytest.raises(InvalidArgument, match=r"flush_seconds must be >= 0, got -1"):
        MLflow("digits", tracking_uri=store, flush_seconds=-1)


def test_trackio() -> None:
    pytest.importorskip("trackio")
    log_all(Trackio("digits", name="first", config={"lr": 0.1}))
    rows = trackio_rows("digits", "first")
    assert same(rows["adadagrad/loss"], LOSS)
    assert rows["val/accuracy"] == ACCURACY
    assert rows["adadagrad/step"] == STEPS
    again = Trackio("digits", name="first", config={"lr": 0.1}, group="some")
    again.log({"adadagrad/loss": 1.0}, samples_seen=512, step=4)
    again.close()
    assert same(trackio_rows("digits", "first")["adadagrad/loss"], [*LOSS, (512, 1.0)])
    import trackio

    (run,) = trackio.Api().runs("digits")
    assert run.config is not None
    assert run.config["lr"] == 0.1
    log_all(Trackio("digits"))
    assert len(trackio.Api().runs("digits")) == 2


def test_prometheus(tmp_path: Path) -> None:
    path = tmp_path / "made" / "run.prom"
    log_all(Prometheus(path, labels={"run": 'a "b"\\\n', "host": "one"}))
    labels = (("run", 'a "b"\\\n'), ("host", "one"))
    values = prometheus_values(path.read_text())
    assert values == {
        ("adadagrad_loss", labels): 1.25,
        ("adadagrad_val_accuracy", labels): 0.5,
        ("adadagrad_samples_seen", labels): 256.0,
        ("adadagrad_step", labels): 3.0,
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["run.prom"]
    assert path.stat().st_mode & stat.S_IROTH  # node exporter is another user


def test_prometheus_writes_what_is_not_finite_and_keeps_names_apart(tmp_path: Path) -> None:
    tracker = Prometheus(tmp_path / "run.prom", every_seconds=0)
    tracker.log({"a/b": math.inf, "a b": -math.inf, "c\\\nd": math.nan}, samples_seen=1, step=1)
    values = prometheus_values((tmp_path / "run.prom").read_text())
    assert values["adadagrad_a_b", ()] == math.inf
    assert values["adadagrad_a_b_2", ()] == -math.inf
    assert math.isnan(values["adadagrad_c__d", ()])


@pytest.mark.parametrize(("seconds", "seen"), [(0.0, 128.0), (60.0, 64.0)])
def test_prometheus_writes_as_often_as_told(tmp_path: Path, seconds: float, seen: float) -> None:
    tracker = Prometheus(tmp_path / "run.prom", every_seconds=seconds)
    for step in (1, 2):
        tracker.log({}, samples_seen=64 * step, step=step)
    assert prometheus_values((tmp_path / "run.prom").read_text())["adadagrad_samples_seen", ()] == seen
    tracker.close()
    assert prometheus_values((tmp_path / "run.prom").read_text())["adadagrad_samples_seen", ()] == 128.0


def test_prometheus_refuses(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"path must end in .prom, .*, got 'run.txt'"):
        Prometheus("run.txt")
    for name in ("1st", "__own", "a-b", ""):
        with pytest.raises(InvalidArgument, match=r"labels must have names of letters, digits and _, got "):
            Prometheus(tmp_path / "run.prom", labels={name: "x"})
    with pytest.raises(InvalidArgument, match=r"every_seconds must be >= 0, got -1"):
        Prometheus(tmp_path / "run.prom", every_seconds=-1)
