"""A run that is killed, or stopped anywhere, goes on from Lightning's own checkpoint as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from tests.integrations.lightning.cases import QUIET, Net, apart, fit, keep_all, newest

pytestmark = QUIET
DROPOUT = 0.2
WHOLE = os.environ.get("ADADAGRAD_SLOW") == "1"
"""Whether to resume from every micro-batch, rather than from every third."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Lightning's own checkpoints go into the working directory."""
    monkeypatch.chdir(tmp_path)


def progress_of(path):
    """What a checkpoint holds of the callback."""
    states = torch.load(path, weights_only=False)["callbacks"]
    (state,) = [state for name, state in states.items() if "AdaptiveBatchCallback" in name]
    return state


def test_resumed_from_every_step(tmp_path):
    settings = {"enable_checkpointing": True, "max_epochs": 2}
    whole, expected, *_ = fit(Net(DROPOUT), more=[keep_all(tmp_path, every_n_train_steps=1)], **settings)
    assert len(set(expected.sizes)) > 3
    paths = newest(tmp_path)
    assert len(paths) == len(expected.sizes)
    for done, path in enumerate(paths, start=1):
        resumed, trace, made, _ = fit(Net(DROPOUT), ckpt_path=path, **settings)
        assert trace.sizes == expected.sizes[done:]
        assert apart(resumed, whole) == 0.0
        assert made.global_step == len(expected.sizes)


def test_resumed_from_saves_in_the_middle_of_a_step_which_validation_makes(tmp_path):
    settings = {"enable_checkpointing": True, "val": True, "val_check_interval": 6}
    whole, expected, *_ = fit(Net(DROPOUT), more=[keep_all(tmp_path)], **settings)
    again = []
    for path in newest(tmp_path):
        state = progress_of(path)
        resumed, trace, *_ = fit(Net(DROPOUT), ckpt_path=path, **settings)
        assert trace.sizes == expected.sizes[state["engine"]["steps"] :]
        assert apart(resumed, whole) == 0.0
        again.append(state["again"])
    assert max(again) > 0
    assert min(again) == 0


def test_a_second_resume_in_the_same_epoch(tmp_path):
    settings = {"enable_checkpointing": True, "max_epochs": 2}
    whole, expected, *_ = fit(Net(DROPOUT), more=[keep_all(tmp_path / "a", every_n_train_steps=1)], **settings)
    more = [keep_all(tmp_path / "b", every_n_train_steps=1)]
    fit(Net(DROPOUT), more=more, ckpt_path=newest(tmp_path / "a")[0], **settings)
    second = newest(tmp_path / "b")[0]
    resumed, trace, *_ = fit(Net(DROPOUT), ckpt_path=second, **settings)
    assert trace.sizes == expected.sizes[progress_of(second)["engine"]["steps"] :]
    assert apart(resumed, whole) == 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a checkpoint was made in the middle")
def test_resumed_from_saves_after_every_micro_batch(tmp_path):
    class Now(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}-{batch_idx}.ckpt")

    settings = {"enable_checkpointing": True, "max_epochs": 2}
    whole, expected, *_ = fit(Net(0.0), more=[Now()], **settings)
    again = []
    for path in newest(tmp_path)[:: 1 if WHOLE else 3]:
        state = progress_of(path)
        resumed, trace, made, _ = fit(Net(0.0), ckpt_path=path, **settings)
        assert trace.sizes == expected.sizes[state["engine"]["steps"] :]
        assert apart(resumed, whole) == 0.0
        assert made.global_step == len(expected.sizes)
        again.append(state["again"])
    assert len(newest(tmp_path)) == 26
    assert max(again) > 3


def test_a_save_that_nobody_could_expect_warns_that_random_numbers_will_differ(tmp_path):
    class Now(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "now.ckpt")

    with pytest.warns(UserWarning, match="in the middle of step 2"):
        fit(more=[Now()], enable_checkpointing=True, max_epochs=1)


def test_stopped_early_in_the_middle_of_a_step_and_resumed(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.should_stop = True

    settings = {"enable_checkpointing": True}
    whole, expected, *_ = fit(Net(DROPOUT), **settings)
    more = [Stop(), keep_all(tmp_path, every_n_train_steps=1)]
    module, trace, *_ = fit(Net(DROPOUT), more=more, **settings)
    assert len(trace.sizes) < len(expected.sizes)
    assert all(p.grad is None for p in module.parameters())
    resumed, rest, *_ = fit(Net(DROPOUT), ckpt_path=newest(tmp_path)[-1], **settings)
    assert trace.sizes + rest.sizes == expected.sizes
    assert apart(resumed, whole) == 0.0


SCRIPT = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
import lightning.pytorch as pl
from tests.integrations.lightning.cases import Net, fit, keep_all
folder, ckpt, pause = sys.argv[1], sys.argv[2] or None, float(sys.argv[3])
class Note(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        with open(folder + "/alive", "a") as file:
            file.write("x")
        time.sleep(pause)
saves = keep_all(folder, every_n_train_steps=1)
module, trace, *_ = fit(Net(0.2), more=[saves, Note()], enable_checkpointing=True, ckpt_path=ckpt)
weights = [p.tolist() for p in module.parameters()]
json.dump([trace.sizes, weights], open(folder + "/done.json", "w"))
"""


def start(folder, ckpt="", pause=0.0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(ckpt), str(pause)], env=environment)


def test_killed_and_resumed_in_another_process(tmp_path):
    killed, resumed = tmp_path / "killed", tmp_path / "resumed"
    killed.mkdir()
    resumed.mkdir()
    process = start(killed, pause=0.2)
    alive, until = killed / "alive", time.monotonic() + 120
    while not (alive.exists() and alive.stat().st_size >= 9):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    whole, expected, *_ = fit(Net(DROPOUT), enable_checkpointing=True)
    last = newest(killed)[-1]
    done = progress_of(last)["engine"]["steps"]
    assert 0 < done < len(expected.sizes)
    assert start(resumed, last).wait(150) == 0
    sizes, weights = json.loads((resumed / "done.json").read_text())
    assert sizes == expected.sizes[done:]
    assert weights == [p.tolist() for p in whole.parameters()]
