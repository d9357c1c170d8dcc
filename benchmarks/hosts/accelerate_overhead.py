"""The engine under Accelerate beside Accelerate's own loop: same model, data, micro-batches and clipping, no policy.

python -m benchmarks.hosts.accelerate_overhead [ROUNDS]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import accelerate
import torch.nn.functional as F
from torch.optim import Adagrad
from torch.utils.data import DataLoader

import adadagrad as ada
from benchmarks.hosts.interleaved import Task, make_data, report


def own(task: Task, accelerator: accelerate.Accelerator) -> Iterator[None]:
    """Make steps as Accelerate's documentation has them.

    Args:
        task: The task.
        accelerator: Accumulates as many micro-batches as the task has.

    Yields:
        Nothing, once for each step.
    """
    model = task.build()
    loader = DataLoader(make_data(task), batch_size=task.micro_batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, Adagrad(model.parameters(), lr=0.01), loader)
    while True:
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(inputs), targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                yield


def engine(task: Task, accelerator: accelerate.Accelerator) -> Iterator[None]:
    """Make the same steps by the engine.

    Args:
        task: The task.
        accelerator: Accumulates nothing.

    Yields:
        Nothing, once for each step.
    """
    model = task.build()
    loader = DataLoader(make_data(task), batch_size=task.micro_batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, Adagrad(model.parameters(), lr=0.01), loader)
    run = ada.AdaptiveBatch(
        model,
        optimizer,
        loader,
        ada.ConstantBatch(task.global_batch_size),
        micro_batch_size=task.micro_batch_size,
        epochs=10_000,
        max_grad_norm=1.0,
        accelerator=accelerator,
    )
    for step in run:
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        step.update()
        yield


def loops(task: Task) -> Mapping[str, Iterator[None]]:
    """Return the loops of a task.

    Args:
        task: The task.
    """
    from accelerate.state import GradientState

    count = task.global_batch_size // task.micro_batch_size
    GradientState._reset_state()
    accelerators = accelerate.Accelerator(cpu=True)
    ours = engine(task, accelerators)
    next(ours)  # made while nothing is accumulated, which is a setting of the whole process
    accelerators.gradient_accumulation_steps = count
    return {"own": own(task, accelerators), "engine": ours, "control": own(task, accelerators)}


if __name__ == "__main__":
    report("accelerate", accelerate.__version__, loops, int(sys.argv[1]) if len(sys.argv) > 1 else 22)
