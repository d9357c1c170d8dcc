"""Killing and resuming `AdaptiveBatchTrainer` through Trainer's own checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer

from adadagrad import NormTest, StagedBatch
from adadagrad.core.errors import CorruptCheckpoint, InvalidArgument
from adadagrad.integrations.transformers import AdaptiveBatchTrainer
from tests.integrations.transformers_cases import Linear, Watching, arguments, rows, sizes


def run(folder, step):
    """Return the exit status of a run that is killed after so many steps."""
    command = [sys.executable, "-m", "tests.integrations.transformers_killed", str(folder), str(step)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240, check=False).returncode


def test_a_run_that_is_killed_twice_goes_on_as_if_nothing_had_been(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert run(whole, 0) == 0
    steps = json.loads((whole / "trace.json").read_text())[2]
    assert steps > 12
    assert run(killed, 5) == run(killed, 11) == -9
    assert sorted(path.name for path in killed.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    assert run(killed, 0) == 0
    expected, found = (json.loads((folder / "trace.json").read_text()) for folder in (whole, killed))
    assert found == expected
    assert len(set(expected[0])) > 3
    weights = [torch.load(folder / "weights.pt", weights_only=True) for folder in (whole, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    logs = [
        [
            {name: value for name, value in json.loads(line).items() if "seconds" not in name and name != "time"}
            for line in (folder / "run" / "run.jsonl").read_text().splitlines()
        ]
        for folder in (whole, killed)
    ]
    assert logs[0] == logs[1]


class Stop(Watching):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_step_end(self, args, state, control, **others):
        super().on_step_end(args, state, control, **others)
        control.should_training_stop |= state.global_step == self.step


def stopped(folder, step=10, our=None, trainer=AdaptiveBatchTrainer, resume=None, **changed):
    """Return a trainer that has saved every second step, and the rows that its model was shown."""
    model = Linear()
    our = {"policy": StagedBatch({0: 16, 48: 40})} if our is None else our
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    made = trainer(
        model, arguments(folder, **settings | changed), train_dataset=rows(100), callbacks=[Stop(step)], **our
    )
    made.train(resume_from_checkpoint=resume)
    return made, model


def test_the_data_go_on_where_the_checkpoint_was(tmp_path):
    first, before = stopped(tmp_path, 4)
    second, after = stopped(tmp_path, resume=True)
    reference, model = stopped(tmp_path / "whole")
    assert before.seen + after.seen == model.seen
    assert sizes(second) == sizes(reference)
    assert second.state.epoch == 3.0
    assert second.state.max_steps == second.state.global_step
    assert second.state.log_history[-1]["train_samples_per_second"] == pytest.approx(
        (300 - first.state.log_history[-1]["adadagrad/samples_seen"]) / second.state.log_history[-1]["train_runtime"],
        rel=1e-2,
    )


def test_another_micro_batch_size_may_resume(tmp_path):
    stopped(tmp_path, 4)
    second, after = stopped(tmp_path, resume=True, per_device_train_batch_size=5)
    reference, model = stopped(tmp_path / "whole")
    assert max(after.sizes) == 5
    assert sizes(second) == sizes(reference)
    assert after.seen == model.seen[-len(after.seen) :]
    torch.testing.assert_close(after.linear.weight, model.linear.weight, rtol=0, atol=1e-6)


def test_a_finished_run_has_nothing_left(tmp_path):
    stopped(tmp_path)
    again, model = stopped(tmp_path, resume=True)
    assert model.seen == []
    assert again.state.epoch == 3.0


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path):
    stopped(tmp_path, 6)
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1')
    with pytest.warns(UserWarning, match="checkpoint-6 is no whole checkpoint.*going back"):
        _, after = stopped(tmp_path, resume=True)
    _, model = stopped(tmp_path / "whole")
    assert after.seen == model.seen[-len(after.seen) :]
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    with pytest.raises(CorruptCheckpoint, match="checkpoint-6 is no whole checkpoint"):
        stopped(tmp_path, resume=str(tmp_path / "checkpoint-6"))
    for path in tmp_path.glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    with (
        pytest.warns(UserWarning, match="is no whole checkpoint"),
        pytest.raises(CorruptCheckpoint, match="none of the"),
    ):
        stopped(tmp_path, resume=True)


def test_damage_is_found(tmp_path):
    stopped(tmp_path, 4)
    path = tmp_path / "checkpoint-4" / "adadagrad.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"adadagrad\.pt"):
        stopped(tmp_path, resume=str(path.parent))
    with pytest.warns(UserWarning, match="going back to the one before it"):
        _, after = stopped(tmp_path, resume=True)
    assert len(after.seen) == 300 - 32


def test_checkpoints_that_say_too_little_are_refused(tmp_path):
    stopped(tmp_path, 4, {}, Trainer)
    with pytest.raises(InvalidArgument, match=r"holds no adadagrad\.pt: it was saved by another trainer"):
        stopped(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    stopped(tmp_path / "only", 4, save_only_model=True)
    with pytest.raises(InvalidArgument, match="save_only_model=True"):
        stopped(tmp_path / "only", resume=str(tmp_path / "only" / "checkpoint-4"))
    with pytest.raises(InvalidArgument, match="checkpoint-5' does not exist"):
        stopped(tmp_path, resume=str(tmp_path / "checkpoint-5"))
    with pytest.raises(InvalidArgument, match="holds no checkpoint: leave it out to begin"):
        stopped(tmp_path / "none", resume=True)


def test_another_rate_is_refused(tmp_path):
    from adadagrad import AdaScale

    stopped(tmp_path, 4)
    with pytest.raises(InvalidArgument, match="another learning-rate rule"):
        stopped(tmp_path, our={"policy": NormTest(eta=0.5), "rate": AdaScale()}, resume=True)
