"""What measuring every example's gradient costs: ratios to a plain step, medians of interleaved steps in one process.

    python -m benchmarks.statistics [--rounds 20] [--models cnn gpt] [--threads 2]

A plain step is forward, backward and update (Adagrad) = 1.00. "control" is the same plain step a second time: how far
it is from 1 is how far any other ratio may be trusted; a model whose control leaves 0.97 to 1.03 is measured again,
at most twice. "all examples" forms the squared norm of every example's gradient and s = |g|^2 inside the step;
"quarter" measures a quarter of the batch as the step's first micro-batch; "inner products" and "coordinates" measure
all examples and form <g_i, g>, or the largest V_j / g_j^2, as well. "default" is a run of `AdaptiveBatch` at this batch
size with `Measure()`, beside the same run without. "added" is what measuring all examples adds.

The error is the largest relative one of |g_i|^2, in the model's float32, against a loop over examples in float64. Data
are random: what a step costs does not depend on them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics.base import Request
from benchmarks.engine import ALLOCATOR
from benchmarks.machine import machine, write_json
from benchmarks.models import MODELS, Workload

CONTROL = (0.97, 1.03)
TRIES = 3
REQUESTS = {
    "all examples": Request(),
    "quarter": Request(),
    "inner products": Request(inner_products=True),
    "coordinates": Request(coordinates=CoordinateReduction(kind="max")),
}
Run = Callable[[], object]


def plain(work: Workload, x: Tensor, y: Tensor) -> Run:
    """Return a plain step on a model of its own."""
    model, optimizer = work.fresh()

    def run() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def measured(work: Workload, x: Tensor, y: Tensor, request: Request, part: int) -> Run:
    """Return a step that measures its first `part` examples."""
    model, optimizer = work.fresh()
    instrument = ada.PerExample().open(model, request)
    n = len(x)

    def run() -> ada.GradientStatistics:
        with instrument.micro_batch(part, 1 / n):
            (F.cross_entropy(model(x[:part]), y[:part]) * (part / n)).backward()
        if part < n:
            instrument.close_group()
            (F.cross_entropy(model(x[part:]), y[part:]) * (1 - part / n)).backward()
        statistics = instrument.finish(n)
        optimizer.step()
        optimizer.zero_grad()
        return statistics

    return run


def interleaved(runs: dict[str, Run], rounds: int, steps: int) -> dict[str, list[float]]:
    """Time all runs in turn, each round in another order.

    Args:
        runs: What to time, by name.
        rounds: How often.
        steps: Calls that are timed together.

    Returns:
        Seconds per call, one number a round.
    """
    names = list(runs)
    for name in names:  # the first measured steps verify and make trial runs; so do steps 5 and 9, rarely met later
        for _ in range(9):
            runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            for _ in range(steps):
                runs[name]()
            times[name].append((time.perf_counter() - started) / steps)
    return times


def whole_run(work: Workload, data: TensorDataset, steps: int, measure: ada.Measure | None) -> float:
    """Return the seconds of an engine's run at a constant batch size, measuring or not."""
    model, optimizer = work.fresh()
    engine = ada.AdaptiveBatch(
        model, optimizer, data, ada.ConstantBatch(work.batch),
        micro_batch_size=work.batch, total_samples=steps * work.batch, measure=measure,
    )  # fmt: skip
    started = time.perf_counter()
    for step in engine:
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        step.update()
    return time.perf_counter() - started


def largest_error(work: Workload, x: Tensor, y: Tensor) -> float:
    """Return the largest relative error of |g_i|^2 over at most 16 examples."""
    x, y = x[:16], y[:16]
    model, _ = work.fresh()
    instrument = ada.PerExample().open(model, Request())
    errors = []
    exact = work.fresh()[0].double()
    wide = x if work.tokens else x.double()
    for _ in range(2):  # the second step delivers through the taps what the first verified
        with instrument.micro_batch():
            F.cross_entropy(model(x), y).backward()
        instrument.finish()
        model.zero_grad()
    with instrument.micro_batch():
        F.cross_entropy(model(x), y).backward()
    squares = instrument._step.sums.squares[0][1]
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(exact(wide[i : i + 1]), y[i : i + 1]), list(exact.parameters()))
        true = sum(float(g.square().sum()) for g in gradients)
        errors.append(abs(float(squares[i]) / true - 1))
    return max(errors)


def main() -> None:
    """Time all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--columns", nargs="+", choices=list(REQUESTS), default=list(REQUESTS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.statistics", *sys.argv[1:]], os.environ | ALLOCATOR
        )
    torch.set_num_threads(options.threads)
    print(f"{options.rounds} interleaved rounds; {machine()}", flush=True)
    columns = ["plain, ms", "control", *options.columns, "added, ms"]
    print(f"| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}", flush=True)
    rows: dict[str, Any] = {}
    for name in options.models:
        work = MODELS[name]
        x, y = work.data(work.batch)
        for _ in range(TRIES):
            runs = {"plain": plain(work, x, y), "control": plain(work, x, y)}
            for column in options.columns:
                part = work.batch // 4 if column == "quarter" else work.batch
                runs[column] = measured(work, x, y, REQUESTS[column], part)
            times = interleaved(runs, options.rounds, work.steps)
            control = median(times["control"]) / median(times["plain"])
            if CONTROL[0] <= control <= CONTROL[1]:
                break
        base = (median(times["plain"]) + median(times["control"])) / 2
        ratios = [f"{median(times[column]) / base:.3f}" for column in options.columns]
        added = 1e3 * (median(times[options.columns[0]]) - base)
        print(
            f"| {name} b={work.batch} | {1e3 * base:.3f} | {control:.3f} | {' | '.join(ratios)} | {added:.3f} |",
            flush=True,
        )
        rows[name] = times
    print("written to", write_json("statistics", {"rows": rows}))


if __name__ == "__main__":
    main()
