"""Processor times of several loops, taken in turns in one process, as ratios to the first one's.

Of one thread, in seconds of the processor rather than of the clock, because a shared machine's clock also times others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from adadagrad.cli.models import cnn
from benchmarks.machine import machine, write_json

BAR = 1.03
"""The ratio to the host's own loop that the engine is to stay under where nothing is measured."""


@dataclass(frozen=True)
class Task:
    """A model, the shape of its inputs, and how a step is cut.

    Args:
        build: Makes the model.
        shape: Of one input.
        global_batch_size: Examples of a step.
        micro_batch_size: Examples of a forward.
        steps: Steps that are timed at a time.
        in_memory: Whether the data are tensors in memory, which the engine cuts batches from; otherwise examples are
            fetched one by one, and the engine seeds the generators before each.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    global_batch_size: int
    micro_batch_size: int
    steps: int
    in_memory: bool = False


def mlp() -> nn.Module:
    """Return a model of a million parameters."""
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 700), nn.ReLU(), nn.Linear(700, 10))


TASKS = {
    "cnn, 256 in one, in memory": Task(lambda: cnn((1, 28, 28), 10), (1, 28, 28), 256, 256, 3, in_memory=True),
    "cnn, 256 in four, in memory": Task(lambda: cnn((1, 28, 28), 10), (1, 28, 28), 256, 64, 3, in_memory=True),
    "cnn, 256 in one, fetched": Task(lambda: cnn((1, 28, 28), 10), (1, 28, 28), 256, 256, 3),
    "mlp of 1 M parameters, 256 in one, in memory": Task(mlp, (256,), 256, 256, 10, in_memory=True),
    "mlp of 1 M parameters, 256 in one, fetched": Task(mlp, (256,), 256, 256, 10),
}


class Rows(Dataset[tuple[Tensor, ...]]):
    """A data set like any user's, whose examples are fetched one by one and collated."""

    def __init__(self, data: TensorDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self._data[index]


def make_data(task: Task) -> Dataset[tuple[Tensor, ...]]:
    """Return twenty batches of noise.

    Args:
        task: What it is for.
    """
    count = 20 * task.global_batch_size
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(count, *task.shape), torch.randint(0, 10, (count,)))
    return data if task.in_memory else Rows(data)


@dataclass(frozen=True)
class Ratio:
    """A ratio of times: its median over rounds, and the quartiles."""

    median: float
    low: float
    high: float


def ratios(loops: Mapping[str, Iterator[None]], steps: int, rounds: int) -> dict[str, Ratio]:
    """Let loops take turns, and return their times beside the first one's.

    Args:
        loops: Iterators that make a step each time they are asked; the first is the reference, and "control" should be
            the same once more, which says how far a ratio may be trusted.
        steps: Steps of a turn.
        rounds: Turns of each; the first two are not counted.

    Returns:
        A ratio for each loop but the first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        names = list(loops)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.process_time()
            for _ in range(steps):
                next(loops[name])
            seconds[name].append(time.process_time() - started)
    reference, *others = loops
    found = {}
    for name in others:
        each = [a / b for a, b in zip(seconds[name][2:], seconds[reference][2:], strict=True)]
        low, _, high = quantiles(each, n=4)
        found[name] = Ratio(median(each), low, high)
    return found


def report(host: str, version: str, loops: Callable[[Task], Mapping[str, Iterator[None]]], rounds: int) -> None:
    """Measure all tasks, print a table, and write it.

    Args:
        host: The host's name.
        version: Its version.
        loops: Makes a task's loops.
        rounds: Turns of each.
    """
    torch.set_num_threads(1)
    print(f"{host} {version}; {machine()}")
    print(f"{rounds} rounds in turns, median ratio (quartiles) of processor time to {host}'s own loop")
    table: dict[str, Any] = {}
    for name, task in TASKS.items():
        found = ratios(loops(task), task.steps, rounds)
        table[name] = {loop: asdict(ratio) for loop, ratio in found.items()}
        cells = [f"{loop} {r.median:.3f} ({r.low:.3f} to {r.high:.3f})" for loop, r in found.items()]
        print(f"{name}: {', '.join(cells)}", flush=True)
    write_json(f"hosts/{host}", {"version": version, "rounds": rounds, "bar": BAR, "ratios": table})
