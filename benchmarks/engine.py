"""What the engine costs beside a hand-written loop: ratios of medians from interleaved runs in one process.

    python -m benchmarks.engine [--pairs 11]

The hand-written loop is the tightest one: it indexes tensors by a permutation, without a DataLoader, without a log.
The engine writes run.jsonl. "control" is the same hand-written loop a second time: how far it is from 1 is how far
any other ratio may be trusted. Data: 20,000 synthetic 28x28 images of ten noisy prototypes.

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
from statistics import median

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
WHOLE_RUN = 40_000


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
    build: Callable[..., nn.Module], data: TensorDataset, policy: AbstractPolicy, samples: int, start: int | None = None
) -> tuple[float, list[int], float]:
    """Train with the engine.

    Args:
        build: Makes the model.
        data: The images.
        policy: What chooses the batch size.
        samples: Budget.
        start: First batch size of a test.

    Returns:
        Seconds, the batch sizes, seconds spent measuring.
    """
    model, optimizer = fresh(build)
    sizes = []
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        engine = ada.AdaptiveBatch(
            model,
            optimizer,
            data,
            policy,
            global_batch_size=start,
            micro_batch_size=MICRO_BATCH,
            total_samples=samples,
            log_dir=directory,
        )
        for step in engine:
            step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
            step.update()
            sizes.append(step.global_batch_size)
        seconds = time.perf_counter() - started
    return seconds, sizes, engine.measuring.instrument.seconds


def main() -> None:
    """Run all pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=11, help="interleaved runs of each kind")
    options = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]], os.environ | ALLOCATOR)
    data = images()
    rows = []
    print(f"{options.pairs} interleaved runs of each; {machine()}", flush=True)
    print("| run | hand-written, ms a step | control | engine | bar |\n|---|---|---|---|---|", flush=True)

    def report(name: str, steps: int, hand: list[float], control: list[float], engine: list[float], bar: float) -> None:
        ratios = [median(control) / median(hand), 2 * median(engine) / (median(hand) + median(control))]
        rows.append({"run": name, "hand": hand, "control": control, "engine": engine, "bar": bar})
        step = 1e3 * median(hand) / steps
        print(f"| {name} | {step:.3f} | {ratios[0]:.3f} | {ratios[1]:.3f} | <= {bar:.2f} |", flush=True)

    for name, build, size, steps, bar in (
        ("logistic, constant 64", logistic, 64, 600, 1.10),
        ("cnn, constant 64", cnn, 64, 60, 1.03),
        ("cnn, constant 512", cnn, 512, 12, 1.03),
    ):
        times: list[list[float]] = [[], [], []]
        for _ in range(options.pairs):
            times[0].append(by_hand(build, data, [size] * steps))
            times[2].append(by_engine(build, data, ada.ConstantBatch(size), size * steps)[0])
            times[1].append(by_hand(build, data, [size] * steps))
        report(name, steps, times[0], times[1], times[2], bar)

    times = [[], [], []]
    sizes: list[int] = []
    for _ in range(max(3, options.pairs // 2)):
        seconds, sizes, measuring = by_engine(cnn, data, ada.NormTest(eta=0.5), WHOLE_RUN, start=64)
        times[2].append(seconds)
        times[0].append(by_hand(cnn, data, sizes))
        times[1].append(by_hand(cnn, data, sizes))
    name = f"cnn, norm test eta 0.5 from 64 to {max(sizes)}, whole run"
    report(name, len(sizes), times[0], times[1], times[2], 1.10)
    print(f"\nof which measuring: {measuring / times[2][-1]:.3f} of the engine's time")
    print("written to", write_json("engine", {"rows": rows}))


if __name__ == "__main__":
    main()
