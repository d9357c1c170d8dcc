"""What measuring every example's gradient costs: ratios to a plain step, medians of interleaved steps in one process.

    python -m benchmarks.statistics [--rounds 20] [--models cnn gpt] [--threads 2]
    python -m benchmarks.statistics --device cuda --batches 16 --models cnn resnet gpt large-gpt

A plain step is forward, backward and update (Adagrad) = 1.00. "control" is the same plain step a second time: how far
it is from 1 is how far any other ratio may be trusted; a model whose control leaves 0.97 to 1.03 is measured again, at
most twice. "all examples" forms the squared norm of every example's gradient and s = |g|^2 inside the step; "quarter"
measures a quarter of the batch as the step's first micro-batch; "inner products" and "coordinates" measure all examples
and form <g_i, g>, or the largest V_j / g_j^2, as well; "probe" takes `Probe(probes=4)`. "added" is what measuring all
examples adds to a step. "error" is the relative error of V, measured in the model's float32 on 16 examples, against a
loop over these examples in float64. Data are random: what a step costs does not depend on them. What measuring costs
over a run, where the default settings measure few steps and few examples, benchmarks/default_settings.py shows.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import adadagrad as ada
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics.base import Request
from benchmarks.engine import ALLOCATOR
from benchmarks.machine import machine, write_json
from benchmarks.models import LARGE, MODELS, Workload
from benchmarks.steps import Run, interleaved, measured, plain

CONTROL = (0.97, 1.03)
TRIES = 3
REQUESTS = {
    "all examples": Request(),
    "quarter": Request(),
    "inner products": Request(inner_products=True),
    "coordinates": Request(coordinates=CoordinateReduction(kind="max")),
    "probe": Request(),
}


def error_of_variance(work: Workload) -> float:
    """Return the relative error of V on 16 examples against a loop over them in float64."""
    x, y = work.data(16)
    model, _ = work.fresh()
    exact = work.fresh()[0].double()
    wide = x if work.tokens else x.double()
    instrument = ada.PerExample().open(model, Request())
    for _ in range(4):  # the fourth step is the first that does not verify, and so takes the fast path
        model.zero_grad()
        with instrument.micro_batch():
            F.cross_entropy(model(x), y).backward()
        statistics = instrument.finish()
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(exact(wide[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(exact.parameters()))]))
    return abs(statistics.variance_trace / ada.statistics_from_units(torch.stack(rows)).variance_trace - 1)


def make_runs(work: Workload, columns: Sequence[str]) -> dict[str, Run]:
    """Return everything that is timed for a model, each on a model of its own."""
    x, y = work.data(work.batch)
    runs = {"plain": plain(work, x, y), "control": plain(work, x, y)}
    for column in columns:
        part = work.batch // 4 if column == "quarter" else work.batch
        estimator = ada.Probe(probes=4) if column == "probe" else None
        runs[column] = measured(work, x, y, REQUESTS[column], part, estimator)
    return runs


def main() -> None:
    """Time all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *LARGE], default=list(MODELS))
    parser.add_argument("--device", default="cpu", help="where to run, cpu or cuda")
    parser.add_argument("--batches", type=int, default=1, help="how many times the usual batch a step has")
    parser.add_argument("--columns", nargs="+", choices=list(REQUESTS), default=list(REQUESTS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.statistics", *sys.argv[1:]], os.environ | ALLOCATOR
        )
    torch.set_num_threads(options.threads)
    print(f"{options.rounds} interleaved rounds; {machine()}", flush=True)
    columns = ["plain, ms", "control", *options.columns, "added, ms", "error"]
    print(f"| model | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}", flush=True)
    rows: dict[str, Any] = {}
    for name in options.models:
        work = {**MODELS, **LARGE}[name]
        work = replace(work, device=options.device, batch=work.batch * options.batches)
        for _ in range(TRIES):
            times = interleaved(make_runs(work, options.columns), options.rounds, work.steps)
            control = median(times["control"]) / median(times["plain"])
            if CONTROL[0] <= control <= CONTROL[1]:
                break
        base = (median(times["plain"]) + median(times["control"])) / 2
        ratios = [median(times[column]) / base for column in options.columns]
        added = 1e3 * (median(times[options.columns[0]]) - base)
        cells = [f"{1e3 * base:.3f}", f"{control:.3f}", *(f"{ratio:.3f}" for ratio in ratios), f"{added:.3f}"]
        print(f"| {name} b={work.batch} | {' | '.join(cells)} | {error_of_variance(work):.0e} |", flush=True)
        rows[name] = times
    print("written to", write_json(f"statistics-{options.device}", {"rows": rows}))


if __name__ == "__main__":
    main()
