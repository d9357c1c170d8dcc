"""run.jsonl: the same seed gives the same lines; what they say; readable at any time."""

from __future__ import annotations

import gc
import json
import tempfile
import time

import pytest
import torch

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from tests.engine.cases import TIMES, make_data, make_engine, make_model, mean_loss, read_log, train, weights
from tests.engine.test_resume import CASES, build, go


@pytest.mark.parametrize("name", CASES)
def test_the_same_seed_gives_the_same_log(name, tmp_path):
    logs, final = [], []
    for run in ("one", "two"):
        engine = build(name, tmp_path / run, total_samples=300)
        go(engine, 10**9)
        logs.append(read_log(tmp_path / run))
        final.append(weights(engine.model))
    assert logs[0] == logs[1]
    assert [line["kind"] for line in logs[0]] == ["start", *["step"] * (len(logs[0]) - 2), "end"]
    assert torch.equal(*final)


def test_another_seed_gives_another_log(tmp_path):
    for seed in (1, 2):
        train(make_engine(make_model(), seed=seed, log_dir=tmp_path / str(seed), total_samples=50))
    assert read_log(tmp_path / "1")[1:] != read_log(tmp_path / "2")[1:]


def test_only_the_times_differ(tmp_path):
    train(make_engine(make_model(), log_dir=tmp_path, total_samples=50))
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert "time" in lines[0]
    assert all({"seconds", "measure_seconds"} <= line.keys() for line in lines[1:])
    assert not any(key in TIMES for line in read_log(tmp_path) for key in line)


def test_seconds_are_those_inside_steps_and_go_on_after_a_resume(tmp_path):
    begun, pause = time.perf_counter(), 0.3
    engine = make_engine(make_model(), log_dir=tmp_path, measure=ada.Measure(every=1), total_samples=100)
    train(engine, steps=2)
    engine.save(tmp_path / "state.pt")
    time.sleep(pause)  # an evaluation between two steps is no training
    again = make_engine(make_model(), log_dir=tmp_path, measure=ada.Measure(every=1), total_samples=100)
    again.load(tmp_path / "state.pt")
    assert (again.seconds, again.measuring.instrument.seconds) == (
        engine.seconds,
        engine.measuring.instrument.seconds,
    )
    train(again)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()][1:]
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert 0 < seconds[0] < seconds[-1] <= time.perf_counter() - begun - pause
    assert all(0 < line["measure_seconds"] < line["seconds"] for line in lines)


def test_each_line_says_what_the_decision_says(tmp_path):
    engine = make_engine(make_model(), log_dir=tmp_path, measure=ada.Measure(every=2), total_samples=120)
    decisions = train(engine)
    start, *lines, end = read_log(tmp_path)
    assert start["policy"] == repr(engine.policy)
    assert (start["dataset_size"], start["total_samples"], start["max_batch_size"]) == (203, 120, 120)
    for d, line in zip(decisions, lines, strict=True):
        assert d.observation.dataset_size == 203
        assert line["step"] == d.step
        assert line["samples_seen"] == line["samples_drawn"] == d.samples_seen
        assert line["global_batch_size"] == d.observation.global_batch_size
        assert line["next_global_batch_size"] == d.next_plan.global_batch_size
        assert (line["loss"], line["lr"], line["reason"]) == (d.observation.loss, d.lr, d.reason)
        g = d.observation.gradient
        assert line["measured"] == (g is not None)
        if g is not None:
            assert (line["grad_norm_sq"], line["variance_trace"]) == (g.grad_norm_sq, g.variance_trace)
            left = g.variance_trace / (g.num_examples * g.grad_norm_sq)
            assert line["relative_variance"] == pytest.approx(left, rel=1e-12)
            assert line["threshold"] == engine.policy.eta**2
            assert (line["requested_low"], line["requested_high"]) == (d.requested_low, d.requested_high)
            assert line["variance_trace_error"] == g.variance_trace_error
            assert line["grad_norm_sq_error"] is None  # norms alone were measured
            assert line["requested_low"] < line["requested"] < line["requested_high"]
    assert (end["kind"], end["samples_seen"], end["steps"]) == ("end", 120, len(decisions))


def test_every_line_is_on_disk_when_its_step_ends(tmp_path):
    engine = make_engine(make_model(), log_dir=tmp_path, total_samples=50)
    for step in engine:
        step.run(mean_loss(engine.model))
        step.update()
        engine.log({"val/accuracy": 0.5, "count": 3})
        lines = read_log(tmp_path)
        assert lines[-2]["step"] == engine.steps
        metrics = {"val/accuracy": 0.5, "count": 3.0}
        assert lines[-1] == {
            "kind": "log",
            "step": engine.steps,
            "samples_seen": engine.samples_seen,
            "metrics": metrics,
        }


def test_logging_outside_the_loop_leaves_no_open_file(tmp_path):
    engine = make_engine(make_model(), log_dir=tmp_path, total_samples=50)
    train(engine)
    engine.log({"test/accuracy": 1.0})
    path = str(tmp_path / "run.jsonl")
    assert not [f for f in gc.get_objects() if getattr(type(f), "__name__", "") == "TextIOWrapper" and f.name == path]
    assert read_log(tmp_path)[-1]["metrics"] == {"test/accuracy": 1.0}


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = make_engine(make_model(), total_samples=50)
    train(engine)
    engine.log({"a": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_in_a_new_directory_begins_with_a_start_line(tmp_path):
    first = make_engine(make_model(), log_dir=tmp_path / "old")
    train(first, steps=5)
    first.save(tmp_path / "state.pt")
    second = make_engine(make_model(), log_dir=tmp_path / "new")
    second.load(tmp_path / "state.pt")
    train(second, steps=2)
    kinds = [line["kind"] for line in read_log(tmp_path / "new")]
    assert kinds == ["start", "step", "step"]
    assert read_log(tmp_path / "new")[0]["samples_seen"] == first.samples_seen


def test_a_run_left_in_its_first_step_has_one_start_line(tmp_path):
    first = make_engine(make_model(), log_dir=tmp_path)
    for step in first:
        next(iter(step))
        break
    first.save(tmp_path / "state.pt")
    second = make_engine(make_model(), log_dir=tmp_path)
    second.load(tmp_path / "state.pt")
    train(second, steps=2)
    assert [line["kind"] for line in read_log(tmp_path)] == ["start", "step", "step"]


def test_the_loss_is_the_mean_over_the_batch_and_over_the_weights(tmp_path):
    data, model = make_data(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, y, _, w = data.tensors
    losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none").detach()
    for weighted in (False, True):
        engine = make_engine(model, optimizer, data, ada.StagedBatch({0: 23}), micro_batch_size=7, total_samples=100)

        def loss(batch, weighted=weighted):
            each = torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
            return ((each * batch[3]).sum(), batch[3]) if weighted else each.mean()

        position = 0
        for d in train(engine, loss):
            rows = engine._assembler.source.order.indices(position, d.observation.global_batch_size)
            position += len(rows)
            expected = (losses[rows] * w[rows]).sum() / w[rows].sum() if weighted else losses[rows].mean()
            assert d.observation.loss == pytest.approx(float(expected), rel=1e-13)


BAD_DIRECTORIES = {
    "a file": lambda path: path / "file",
    "below a file": lambda path: path / "file" / "run",
    "with a directory for a log": lambda path: path / "occupied",
    "no path": lambda path: 5,
}


@pytest.mark.parametrize("name", BAD_DIRECTORIES)
def test_a_directory_that_cannot_be_written_in_is_refused_before_the_run(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "occupied" / "run.jsonl").mkdir(parents=True)
    with pytest.raises(InvalidArgument, match=r"^log_dir must be a directory that can be written in, got .*: choose"):
        make_engine(make_model(), log_dir=BAD_DIRECTORIES[name](tmp_path))


def test_a_read_only_directory_is_refused_before_the_run(tmp_path, monkeypatch):
    def read_only(**options):
        raise PermissionError(f"Read-only file system: {options['dir']}")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(InvalidArgument, match=r"log_dir must be a directory that can be written in.*Read-only"):
        make_engine(make_model(), log_dir=tmp_path)
    make_engine(make_model())  # without a log nothing is tried


def test_making_an_engine_leaves_an_empty_directory_and_an_older_log_alone(tmp_path):
    make_engine(make_model(), log_dir=tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
    (tmp_path / "run.jsonl").write_text("what was there\n")
    make_engine(make_model(), log_dir=tmp_path)
    assert (tmp_path / "run.jsonl").read_text() == "what was there\n"


def test_metrics_may_come_before_the_first_step(tmp_path):
    engine = make_engine(make_model(), log_dir=tmp_path)
    engine.log({"val/accuracy": 0.1})
    train(engine, steps=2)
    lines = read_log(tmp_path)
    assert [line["kind"] for line in lines] == ["start", "log", "step", "step"]
    assert lines[1]["samples_seen"] == 0


@pytest.mark.parametrize("value", ["high", None, torch.ones(2)])
def test_a_metric_that_is_no_number_is_named_and_nothing_is_written(value, tmp_path):
    engine = make_engine(make_model(), log_dir=tmp_path)
    with pytest.raises(InvalidArgument, match=r"^metrics\['val/accuracy'\] must be a number, got .*: log one number"):
        engine.log({"loss": 1.0, "val/accuracy": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("logged", [True, False])
def test_a_state_never_cuts_the_log_of_another_run(logged, tmp_path):
    other = make_engine(make_model(), log_dir=tmp_path / "other")
    train(other, steps=8)
    before = (tmp_path / "other" / "run.jsonl").read_bytes()
    first = make_engine(make_model(), log_dir=tmp_path / "first" if logged else None)
    train(first, steps=2)
    first.save(tmp_path / "state.pt")
    model = make_model(seed=9)
    second = make_engine(model, log_dir=tmp_path / "other")
    with pytest.raises(InvalidArgument, match=r"log_dir holds the log of another run.*from a checkpoint of its own"):
        second.load(tmp_path / "state.pt")
    assert (tmp_path / "other" / "run.jsonl").read_bytes() == before
    assert torch.equal(weights(model), weights(make_model(seed=9)))
    assert second.samples_seen == 0
