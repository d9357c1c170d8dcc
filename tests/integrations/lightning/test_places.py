"""Checkpoints from unusual places: a callback before ours, after an error, another micro-batch, no callback."""

from __future__ import annotations

import csv
import inspect
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from adadagrad.core.errors import InvalidArgument
from tests.integrations.lightning.cases import (
    QUIET,
    N,
    Net,
    Trace,
    apart,
    callback,
    fit,
    keep_all,
    loader,
    newest,
    trainer,
)
from tests.integrations.lightning.test_resume import progress_of

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:a checkpoint was made in the middle")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Lightning's own checkpoints go into the working directory."""
    monkeypatch.chdir(tmp_path)


class Save(pl.Callback):
    """Saves after every micro-batch."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(f"{trainer.current_epoch}-{batch_idx:02d}.ckpt")


def saved(**settings):
    """A run with a checkpoint after each micro-batch; return its module and trace."""
    return fit(more=[Save()], enable_checkpointing=True, **settings)[:2]


def test_a_callback_before_ours_saves_after_the_optimizer_has_stepped(tmp_path):
    adaptive, whole = callback(), Net()
    trace = Trace(adaptive)
    trainer(Save(), adaptive, trace, enable_checkpointing=True, max_epochs=2).fit(whole, adaptive.loader(loader()))
    assert len(newest(tmp_path)) == 26
    for path in newest(tmp_path)[7::5] + newest(tmp_path)[12:20:7]:
        resumed, rest, *_ = fit(ckpt_path=path, max_epochs=2)
        assert rest.sizes == trace.sizes[progress_of(path)["engine"]["steps"] :]
        assert apart(resumed, whole) == 0.0


@pytest.mark.skipif(
    "save_on_exception" not in inspect.signature(ModelCheckpoint).parameters, reason="this Lightning saves none"
)
@pytest.mark.parametrize("fails", [7, 12])
def test_a_checkpoint_that_an_error_has_made(tmp_path, fails):
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 1 and batch_idx == fails:
                raise RuntimeError("the disk is full")
            return super().training_step(batch, batch_idx)

    whole, expected, *_ = fit()
    with pytest.raises(RuntimeError, match="disk"):
        fit(Failing(), more=[keep_all(tmp_path, save_on_exception=True)], enable_checkpointing=True)
    path = newest(tmp_path)[-1]
    assert progress_of(path)["again"] == fails - 6  # the step before ends with micro-batch 6
    resumed, rest, *_ = fit(ckpt_path=path)
    assert rest.sizes == expected.sizes[4:]
    assert apart(resumed, whole) == 0.0


def test_a_checkpoint_after_training_was_stopped_in_the_middle_of_a_step():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.current_epoch == 1 and batch_idx == 4

    _, _, made, _ = fit(more=[Stop()], enable_checkpointing=True)
    made.save_checkpoint("after.ckpt")
    assert progress_of("after.ckpt")["again"] == 5
    module, trace, *_ = fit(ckpt_path="after.ckpt", max_epochs=2)
    assert trace.sizes == []  # Lightning has counted the epoch
    module, trace, *_ = fit(ckpt_path="after.ckpt", max_epochs=3)
    assert sum(trace.sizes) == N == sum(len(seen) for seen in module.seen)


@pytest.mark.parametrize("micro", [4])
@pytest.mark.parametrize("place", ["0-12", "1-03", "1-12"])
def test_resumed_with_another_micro_batch(micro, place):
    saved()
    adaptive = callback(global_batch_size=48)
    trace, module = Trace(adaptive), Net()
    made = trainer(adaptive, trace)
    made.fit(module, adaptive.loader(loader(micro=micro)), ckpt_path=f"{place}.ckpt")
    assert adaptive.engine.samples_seen == 3 * N
    done = progress_of(f"{place}.ckpt")["engine"]["samples_drawn"]
    assert sum(trace.sizes) == sum(len(seen) for seen in module.seen) == 3 * N - done
    assert made.current_epoch == 3


@pytest.mark.parametrize("place", ["0-12", "1-03"])
def test_a_checkpoint_that_was_made_without_the_callback_is_refused(place):
    trainer(Save(), enable_checkpointing=True).fit(Net(), loader())
    with pytest.raises(InvalidArgument, match="without it"):
        fit(ckpt_path=f"{place}.ckpt")


def test_a_validation_that_counts_the_batches_of_all_epochs_is_foreseen(tmp_path):
    settings = {"enable_checkpointing": True, "val": True, "val_check_interval": 7, "check_val_every_n_epoch": None}
    whole, expected, *_ = fit(Net(0.2), more=[keep_all(tmp_path)], **settings)
    again = []
    for path in newest(tmp_path):
        again.append(progress_of(path)["again"])
        resumed, rest, *_ = fit(Net(0.2), ckpt_path=path, **settings)
        assert rest.sizes == expected.sizes[progress_of(path)["engine"]["steps"] :]
        assert apart(resumed, whole) == 0.0
    assert max(again) > 0


def axis(logger, name):
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return [(int(row["step"]), row[name]) for row in csv.DictReader(file) if row[name]]


def test_a_number_is_logged_at_the_step_that_has_measured_it_alone(tmp_path):
    from adadagrad import Measure

    logger = CSVLogger(tmp_path)
    _, trace, made, _ = fit(adaptive=callback(measure=Measure(every=3)), logger=logger, log_every_n_steps=1)
    asked = [(d.step - 1, d.requested) for d in trace.decisions if d.requested is not None]
    assert 1 < len(asked) < len(trace.decisions) - 1
    assert [(step, float(value)) for step, value in axis(logger, "adadagrad/requested")] == asked
    assert [step for step, _ in axis(logger, "adadagrad/samples_seen")] == list(range(len(trace.decisions)))
    assert float(made.callback_metrics["adadagrad/samples_seen"]) == 3 * N


def test_the_loggers_axis_goes_on_where_a_step_is_run_again(tmp_path):
    class Logging(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    settings = {"enable_checkpointing": True, "val": True, "val_check_interval": 5, "log_every_n_steps": 1}
    logger = CSVLogger(tmp_path / "csv")
    fit(Logging(), more=[keep_all(tmp_path)], logger=logger, **settings)
    expected = [step for step, _ in axis(logger, "loss")]
    for path in newest(tmp_path)[:5]:
        logger = CSVLogger(tmp_path / "csv", name=path.stem)
        fit(Logging(), ckpt_path=path, logger=logger, **settings)
        done = progress_of(path)["engine"]["steps"]
        assert [step for step, _ in axis(logger, "loss")] == expected[done:]
        assert [step for step, _ in axis(logger, "adadagrad/lr")] == expected[done:]


def test_the_callback_and_its_loader_can_be_sent_to_spawned_processes():
    import pickle

    adaptive = callback()
    made = adaptive.loader(loader())
    again, its = pickle.loads(pickle.dumps((adaptive, made)))
    assert its is again._loader
    assert torch.equal(its.loader.dataset.tensors[0], made.loader.dataset.tensors[0])
