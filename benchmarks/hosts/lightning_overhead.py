"""Lightning's Trainer with the callback and a constant batch beside the same Trainer without it.

python -m benchmarks.hosts.lightning_overhead [ROUNDS]

Whole runs take turns, because a Trainer cannot be stopped between two steps; of each the processor time between its
first and its last micro-batch counts.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from statistics import median, quantiles
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import adadagrad as ada
from adadagrad.integrations.lightning import AdaptiveBatchCallback
from benchmarks.hosts.interleaved import BAR, TASKS, Ratio, Task, make_data
from benchmarks.machine import machine, write_json

ROUNDS = 12


class Module(pl.LightningModule):
    """A classifier as Lightning's users write them.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the mean loss of a micro-batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdaGrad."""
        return torch.optim.Adagrad(self.parameters(), lr=0.01)


class Clock(pl.Callback):
    """Notes the processor time from the end of the first micro-batch to the end of the last one."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        """Read the clock."""
        self.last = time.process_time()
        self.first = self.last if self.first is None else self.first


def seconds(task: Task, *, adaptive: bool) -> float:
    """Train for an epoch and return the time of its micro-batches but the first.

    Args:
        task: The task.
        adaptive: Whether with the callback.
    """
    torch.manual_seed(0)
    clock, loader = Clock(), DataLoader(make_data(task), batch_size=task.micro_batch_size, shuffle=True)
    callbacks: list[pl.Callback] = [clock]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    count = task.global_batch_size // task.micro_batch_size
    given: Any = loader
    if adaptive:
        callback = AdaptiveBatchCallback(ada.ConstantBatch(task.global_batch_size))
        callbacks, given, count = [callback, clock], callback.loader(loader), 1
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        accumulate_grad_batches=count,
        gradient_clip_val=1.0,
        **quiet,
    )
    trainer.fit(Module(task.build()), given)
    assert clock.first is not None
    return clock.last - clock.first


def compare(task: Task, rounds: int) -> dict[str, Ratio]:
    """Return the ratios of the callback's times, and of a control, to Lightning's own.

    Args:
        task: The task.
        rounds: Runs of each; the first is not counted.
    """
    ways: dict[str, Callable[[], float]] = {
        "own": lambda: seconds(task, adaptive=False),
        "engine": lambda: seconds(task, adaptive=True),
        "control": lambda: seconds(task, adaptive=False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)
        for name in names[number % 3 :] + names[: number % 3]:
            times[name].append(ways[name]())
    found = {}
    for name in ("engine", "control"):
        each = [a / b for a, b in zip(times[name][1:], times["own"][1:], strict=True)]
        low, _, high = quantiles(each, n=4)
        found[name] = Ratio(median(each), low, high)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    print(f"lightning {lightning.__version__}; {machine()}")
    print(f"{rounds} runs of each in turns, median ratio (quartiles) of processor time to Lightning's own")
    table: dict[str, Any] = {}
    for name, task in TASKS.items():
        found = compare(task, rounds)
        table[name] = {way: asdict(ratio) for way, ratio in found.items()}
        cells = [f"{way} {r.median:.3f} ({r.low:.3f} to {r.high:.3f})" for way, r in found.items()]
        print(f"{name}: {', '.join(cells)}", flush=True)
    write_json("hosts/lightning", {"version": lightning.__version__, "rounds": rounds, "bar": BAR, "ratios": table})
