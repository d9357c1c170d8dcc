"""What the engine costs beside a hand-written loop: ratios of medians from interleaved runs in one process.

    python -m benchmarks.engine [--pairs 20]

The hand-written loop is the tightest one: it indexes tensors by a permutation, without a DataLoader, and writes no
log. "control" is the same hand-written loop a second time: how far it is from 1 is how far any other ratio may be
trusted. "engine" does what the loop does, and like it writes no log (`log_dir=None`); "with log" also writes run.jsonl,
a line a step, flushed. Data: 20,000 synthetic 28x28 images of ten noisy prototypes.

The script starts itself again with malloc told to keep freed memory (the MALLOC_ variables below). Without it, whether
a loop's activations are returned to the system and faulted in again at each step depends on the accident of what lies
above them on the heap: 0.8 to 1.2 either way on the convolutional network, for the same work.

The last row is the norm test at default settings over a whole run; the hand-written loop beside it replays the same
batch sizes in the same micro-batches.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.batching import split_batch
from adadagrad.cli.models import cnn, logistic
from adadagrad.policies import AbstractPolicy
from benchmarks.machine import machine, write_json

MICRO_BATCH = 512
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def images(n: int = 20_000) -> TensorDataset:
    """Return noisy prototypes of ten classes.

    Args:
        n: How many.

    Returns:
        Images (n, 1, 28, 28) and labels (n,).
    """
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 1, 28, 28, generator=generator)
    labels = torch.randint(0, 10, (n,), generator=generator)
    return TensorDataset(prototypes[labels] + torch.randn(n, 1, 28, 28, generator=generator), labels)


def fresh(build: Callable[..., nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the same new model and optimizer every time."""
    torch.manual_seed(0)
    model = build((1, 28, 28), 10)
    return model, torch.optim.Adagrad(model.parameters(), lr=8e-3)


def by_hand(build: Callable[..., nn.Module], data: TensorDataset, sizes: Sequence[int]) -> float:
    """Train with a hand-written loop over given batch sizes.

    Args:
        build: Makes the model.
        data: The images.
        sizes: Examples of each step.

    Returns:
        Seconds.
    """
    model, optimizer = fresh(build)
    inputs, labels = data.tensors
    started = time.perf_counter()
    order, position = torch.randperm(len(inputs)), 0
    total = 0.0
    for size in sizes:
        loss_sum = 0.0
        for part in split_batch(size, MICRO_BATCH):
            if position + part > len(order):
                order, position = torch.randperm(len(inputs)), 0
            rows = order[position : position + part]
            position += part
            loss = F.cross_entropy(model(inputs[rows]), labels[rows]) * (part / size)
            loss.backward()
            loss_sum += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        total += loss_sum
    return time.perf_counter() - started


def by_engine(
    build: Callable[..., nn.Module], data: TensorDataset, policy: AbstractPolicy, samples: int, *, log: bool
) -> tuple[float, list[int]]:
    """Train with the engine, a test starting at 64.

    Args:
        build: Makes the model.
        data: The images.
        policy: What chooses the batch size.
        samples: Budget.
        log: Whether to write run.jsonl.

    Returns:
        Seconds, and the batch sizes.
    """
    model, optimizer = fresh(build)
    sizes = []
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        engine = ada.AdaptiveBatch(
            model, optimizer, data, policy, global_batch_size=64 if policy.needs else None,
            micro_batch_size=MICRO_BATCH, total_samples=samples, log_dir=directory if log else None,
        )  # fmt: skip
        for step in engine:
            step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
            step.update()
            sizes.append(step.global_batch_size)
        seconds = time.perf_counter() - started
    return seconds, sizes


@dataclass(frozen=True)
class Row:
    """A comparison: which model, which policy, how many examples, how many runs of each kind, and its bar."""

    name: str
    build: Callable[..., nn.Module]
    policy: AbstractPolicy
    samples: int
    bar: float
    share: float = 1.0


ROWS = [
    Row("logistic, constant 64", logistic, ada.ConstantBatch(64), 600 * 64, 1.10),
    Row("cnn, constant 64", cnn, ada.ConstantBatch(64), 60 * 64, 1.03),
    Row("cnn, constant 512", cnn, ada.ConstantBatch(512), 12 * 512, 1.03),
    Row("cnn, norm test eta 0.5, default settings, whole run", cnn, ada.NormTest(eta=0.5), 40_000, 1.10, share=0.5),
]


def compare(row: Row, data: TensorDataset, pairs: int) -> tuple[dict[str, list[float]], list[int]]:
    """Time all kinds of run in turn, each round in another order.

    Args:
        row: What to compare.
        data: The images.
        pairs: Runs of each kind.

    Returns:
        Seconds by kind, and the batch sizes.
    """
    sizes = by_engine(row.build, data, row.policy, row.samples, log=False)[1]  # warms up as well
    kinds: dict[str, Callable[[], float]] = {
        "hand": lambda: by_hand(row.build, data, sizes),
        "engine": lambda: by_engine(row.build, data, row.policy, row.samples, log=False)[0],
        "control": lambda: by_hand(row.build, data, sizes),
        "with log": lambda: by_engine(row.build, data, row.policy, row.samples, log=True)[0],
    }
    names = list(kinds)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(pairs):
        for name in names[number % 4 :] + names[: number % 4]:
            times[name].append(kinds[name]())
    return times, sizes


def main() -> None:
    """Run all comparisons and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="runs of each kind; half as many in the last row")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    options = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]], os.environ | ALLOCATOR)
    data = images()
    found: dict[str, Any] = {}
    print(f"{options.pairs} interleaved runs of each; {machine()}", flush=True)
    print("| run | hand-written, ms a step | control | engine | with log | bar for engine |\n|---|---|---|---|---|---|")
    for row in ROWS:
        if options.rows not in row.name:
            continue
        times, sizes = compare(row, data, max(1, round(options.pairs * row.share)))
        found[row.name] = {**times, "bar": row.bar, "last batch": sizes[-1]}
        base = (median(times["hand"]) + median(times["control"])) / 2
        ratios = [median(times["control"]) / median(times["hand"])]
        ratios += [median(times[kind]) / base for kind in ("engine", "with log")]
        columns = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {row.name} | {1e3 * base / len(sizes):.3f} | {columns} | <= {row.bar:.2f} |", flush=True)
    print("written to", write_json("engine", {"rows": found}))


if __name__ == "__main__":
    main()
