"""A run of the Hugging Face Trainer that ends itself: ``python -m tests.integrations.transformers_killed FOLDER STEP``.

It goes on from what it finds in the folder, and is killed at the end of the step, before that is saved; 0 lets it live.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from adadagrad import Measure, NormTest
from adadagrad.integrations.transformers import AdaptiveBatchTrainer
from adadagrad.statistics import PerExample
from tests.integrations.transformers_cases import arguments, sentences, sizes, small_gpt


class Kill(TrainerCallback):
    """Ends the process as a power cut would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, step: int) -> None:
    args = arguments(
        folder,
        num_train_epochs=4,
        per_device_train_batch_size=4,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        optim="adamw_torch",
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=3,
        label_names=None,
    )
    trainer = AdaptiveBatchTrainer(
        small_gpt(dropout=0.1),
        args,
        train_dataset=sentences(160),
        policy=NormTest(eta=0.8),
        measure=Measure(every=2, estimator=PerExample()),
        log_dir=folder / "run",
        callbacks=[Kill(step)],
    )
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    rates = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    (folder / "trace.json").write_text(json.dumps([sizes(trainer), rates, trainer.state.global_step]))
    torch.save(trainer.model.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
