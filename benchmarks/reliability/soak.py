"""Tests 24 and 25: memory, file descriptors and threads stay where they are, however long a run is."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import adadagrad as ada
from benchmarks.memory import peak_bytes, resident
from benchmarks.reliability.figure import Figure
from tests.engine.cases import Sizes, make_data, make_engine, make_model, mean_loss, train

STEPS = 100_000
"""Steps of the whole soak; about five minutes on one core."""

WARM_UP = 0.2
"""Part of a run after which nothing may grow any more: caches and allocators have filled by then."""


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of tests 24 and 25.

    Args:
        reduced: 2,000 steps in place of 100,000, and 1,000 in place of 10,000.

    Yields:
        One figure after the other.
    """
    for kind, measure in (("PerExample", None), ("MicroBatch", ada.MicroBatch())):
        name = f"extra gradient copies at the peak of a measured step, {kind}"
        yield Figure(test=24, name=name, value=extra_copies(measure), bar=1.0)
    steps = 1_000 if reduced else 10_000
    name = f"growth of resident memory in {steps} measured steps, MB"
    yield Figure(test=24, name=name, value=growth_while_measuring(steps), bar=1.0)
    steps = 2_000 if reduced else STEPS
    first, last = soak(steps)
    over = f"after {steps} steps of random size, 2 workers"
    yield Figure(test=25, name=f"growth of resident memory {over}, MB", value=(last.bytes - first.bytes) / 1e6, bar=1.0)
    yield Figure(
        test=25, name=f"growth of the workers' memory {over}, MB", value=(last.theirs - first.theirs) / 1e6, bar=1.0
    )
    yield Figure(test=25, name=f"more file descriptors {over}", value=last.files - first.files, bar=0)
    yield Figure(test=25, name=f"more threads {over}", value=last.threads - first.threads, bar=0)


def extra_copies(estimator: Any) -> float:
    """Return what measuring adds to the peak of a step's memory, in gradients of the whole model.

    Args:
        estimator: What measures; None is the default one.
    """
    peaks = []
    for measure in (None, ada.Measure(every=1, **({} if estimator is None else {"estimator": estimator}))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        data = torch.utils.data.TensorDataset(torch.randn(512, 64), torch.randint(0, 10, (512,)))
        engine = ada.AdaptiveBatch(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            data,
            ada.ConstantBatch(64),
            micro_batch_size=16,
            total_samples=64 * 8,
            measure=measure,
        )
        peaks.append(_peak(engine, model))
    whole = 4 * sum(p.numel() for p in model.parameters())
    return (peaks[1] - peaks[0]) / whole


def _peak(engine: Any, model: nn.Module) -> int:
    """Return the peak of the fifth step: the first ones make trial runs."""
    peak = 0
    for number, step in enumerate(engine):

        def whole(step: Any = step) -> None:
            step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
            step.update()

        if number == 4:
            peak = peak_bytes(whole)
        else:
            whole()
    return peak


def growth_while_measuring(steps: int) -> float:
    """Return by how much resident memory grew after the warm-up, in MB."""
    model = make_model()
    engine = make_engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        policy=ada.GradientNoiseScale(averaging=None),
        measure=ada.Measure(every=1),
        global_batch_size=8,
        max_batch_size=40,
        total_samples=100 * steps,
    )
    train(engine, steps=int(WARM_UP * steps))
    before = _settled()
    loss = mean_loss(model)
    for number, step in enumerate(engine):
        step.run(loss)
        step.update()
        if number == steps:
            break
    return (_settled() - before) / 1e6


@dataclass(frozen=True, slots=True)
class Held:
    """What a process and its workers hold: bytes of memory, open files, threads."""

    bytes: int
    theirs: int
    files: int
    threads: int


class Rows(Dataset[Any]):
    """The test data, one example at a time, so that workers have something to fetch."""

    def __init__(self) -> None:
        self.tensors = make_data().tensors

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return one example."""
        return tuple(tensor[index] for tensor in self.tensors)


def soak(steps: int) -> tuple[Held, Held]:
    """Train for so many steps, and return what was held after the warm-up and at the end."""
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of more workers than cores
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        data = DataLoader(Rows(), shuffle=True, num_workers=2)
        engine = make_engine(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            data,
            Sizes(largest=16),
            measure=ada.Measure(every=10),
            micro_batch_size=8,
            total_samples=16 * steps,
        )
        loss, first, last = mean_loss(model), None, None
        for step in engine:
            step.run(loss)
            step.update()
            if step.number == int(WARM_UP * steps):
                first = _held(engine)
            if step.number == steps:
                last = _held(engine)
                break
    assert first is not None
    assert last is not None
    return first, last


def _held(engine: Any) -> Held:
    return Held(
        bytes=_settled(),
        theirs=sum(_resident_of(pid) for pid in engine._assembler.source.worker_pids()),
        files=len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0,
        threads=threading.active_count(),
    )


def _settled() -> int:
    """Return the resident memory of this process, once Python's garbage is collected [bytes]."""
    gc.collect()
    return resident("VmRSS")


def _resident_of(pid: int) -> int:
    """Return the resident memory of another process [bytes]; 0 where the system does not tell."""
    status = Path(f"/proc/{pid}/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
