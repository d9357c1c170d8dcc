"""AdaptiveBatchTrainer, with a batch that never changes, beside Trainer: same model, data, micro-batches and clipping.

    python -m benchmarks.hosts.transformers_overhead [ROUNDS]

In turns in one process, in seconds of the processor, because a shared machine's clock also times others. A turn is a
whole ``train()``, of which the first steps are not counted. "control" is Trainer once more: how far it is from 1 is how
far the other ratio may be trusted.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from adadagrad import ConstantBatch
from adadagrad.integrations.transformers import AdaptiveBatchTrainer
from benchmarks.machine import machine, write_json

BAR = 1.03
"""The ratio that ours is to stay under."""

WARM = 4
"""Steps of a turn that are not counted."""


@dataclass(frozen=True)
class Task:
    """How a step is cut.

    Args:
        micro: Examples of a forward.
        accumulation: Forwards of a step.
        width: Of the model.
        layers: Of the model.
        steps: Steps of a turn that are counted.
    """

    micro: int
    accumulation: int
    width: int
    layers: int
    steps: int


TASKS = {
    "0.1 M parameters, 16 in one": Task(16, 1, 64, 2, 16),
    "0.1 M parameters, 64 in four": Task(16, 4, 64, 2, 5),
    "0.9 M parameters, 32 in one": Task(32, 1, 128, 4, 5),
}


class Clock(TrainerCallback):
    """Times the steps after the first ones."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start behind the first steps, and stop behind every one."""
        if state.global_step == WARM:
            self.started = time.process_time()
        self.seconds = time.process_time() - self.started


def turn(task: Task, ours: bool, data: list[dict[str, torch.Tensor]], folder: str) -> float:
    """Train for one turn.

    Args:
        task: The task.
        ours: Whether by our trainer.
        data: The examples.
        folder: Where nothing is saved.

    Returns:
        Seconds of the processor for the steps that count.
    """
    args = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=task.micro,
        gradient_accumulation_steps=task.accumulation,
        max_steps=WARM + task.steps,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=64, n_embd=task.width, n_layer=task.layers, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model, clock = GPT2LMHeadModel(config), Clock()
    named: dict[str, Any] = {"train_dataset": data, "callbacks": [clock]}
    trainer = (
        AdaptiveBatchTrainer(model, args, **named, policy=ConstantBatch()) if ours else Trainer(model, args, **named)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


def main(rounds: int) -> None:
    """Measure all tasks, print a table, and write it.

    Args:
        rounds: Turns of each; the first one is not counted.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}; {machine()}")
    print(f"{rounds} rounds in turns, median ratio (quartiles) of processor time to Trainer's")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (4000, 64), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, task in TASKS.items():
            seconds: dict[str, list[float]] = {"trainer": [], "ours": [], "control": []}
            for number in range(rounds):
                names = list(seconds)
                for loop in names[number % 3 :] + names[: number % 3]:
                    seconds[loop].append(turn(task, loop == "ours", data, folder))
            table[name] = {}
            for loop in ("ours", "control"):
                each = [a / b for a, b in zip(seconds[loop][1:], seconds["trainer"][1:], strict=True)]
                low, _, high = quantiles(each, n=4)
                table[name][loop] = {"median": median(each), "low": low, "high": high}
            cells = [f"{loop} {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for loop, r in table[name].items()]
            step = median(seconds["trainer"][1:]) / task.steps
            print(f"{name} ({step * 1e3:.1f} ms a step): {', '.join(cells)}", flush=True)
    content = {"version": transformers.__version__, "rounds": rounds, "bar": BAR, "ratios": table}
    write_json("hosts/transformers", content)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 22)
