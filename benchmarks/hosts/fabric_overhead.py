"""The engine under Lightning Fabric beside Fabric's own loop: same model, data, micro-batches and clipping, no policy.

python -m benchmarks.hosts.fabric_overhead [ROUNDS]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial

import lightning
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.optim import Adagrad
from torch.utils.data import DataLoader

import adadagrad as ada
from adadagrad.integrations.fabric import adaptive_batch
from benchmarks.hosts.interleaved import Task, make_data, report


def own(task: Task, fabric: Fabric) -> Iterator[None]:
    """Make steps as Fabric's documentation has them.

    Args:
        task: The task.
        fabric: A launched Fabric.

    Yields:
        Nothing, once for each step.
    """
    model = task.build()
    model, optimizer = fabric.setup(model, Adagrad(model.parameters(), lr=0.01))
    loader = fabric.setup_dataloaders(DataLoader(make_data(task), batch_size=task.micro_batch_size, shuffle=True))
    count = task.global_batch_size // task.micro_batch_size
    while True:
        for index, (inputs, targets) in enumerate(loader, 1):
            last = index % count == 0
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(F.cross_entropy(model(inputs), targets) / count)
            if last:
                fabric.clip_gradients(model, optimizer, max_norm=1.0)
                optimizer.step()
                optimizer.zero_grad()
                yield


def engine(task: Task, fabric: Fabric) -> Iterator[None]:
    """Make the same steps by the engine.

    Args:
        task: The task.
        fabric: A launched Fabric.

    Yields:
        Nothing, once for each step.
    """
    model = task.build()
    model, optimizer = fabric.setup(model, Adagrad(model.parameters(), lr=0.01))
    run = adaptive_batch(
        fabric,
        model,
        optimizer,
        DataLoader(make_data(task), batch_size=task.micro_batch_size, shuffle=True),
        ada.ConstantBatch(task.global_batch_size),
        micro_batch_size=task.micro_batch_size,
        epochs=10_000,
        max_grad_norm=1.0,
    )
    for step in run:
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        step.update()
        yield


def loops(fabric: Fabric, task: Task) -> Mapping[str, Iterator[None]]:
    """Return the loops of a task.

    Args:
        fabric: A launched Fabric.
        task: The task.
    """
    return {"own": own(task, fabric), "engine": engine(task, fabric), "control": own(task, fabric)}


if __name__ == "__main__":
    cpu = Fabric(accelerator="cpu", devices=1)
    cpu.launch()
    report("fabric", lightning.__version__, partial(loops, cpu), int(sys.argv[1]) if len(sys.argv) > 1 else 22)
