"""What measuring costs over a run with the default settings: ratio to plain steps, medians of interleaved runs.

    python -m benchmarks.default_settings [--rounds 20] [--models cnn gpt] [--threads 2]

A run is a number of steps at one batch size. As many of them are measured, at most 128 examples each, as `Measure()`
allows by its cost model; plain runs of as many steps alternate with it, twice a round, the second time as a control. A
run holds at least three measured steps, so that none is missed by chance. All run on one model: where a second one
lies in memory alone makes steps some percents faster or slower. Models, data and a plain step are those of
benchmarks/statistics.py. "share" is the share of steps that are measured. Trial runs and the verifying steps at the
beginning (the 1st, 2nd, 3rd, 5th, 9th measured one) are over before the clock starts.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from statistics import median
from typing import Any

import torch
from torch import Tensor

import adadagrad as ada
from adadagrad.statistics.base import Request
from adadagrad.statistics.planner import MeasureBudget, StepSize
from benchmarks.engine import ALLOCATOR
from benchmarks.machine import machine, write_json
from benchmarks.models import MODELS, Workload
from benchmarks.steps import Run, interleaved, step_of

SIMULATED = 4000
"""Steps over which the share of measured ones is counted."""
MEASUREMENTS = 3
"""Measured steps that a timed run holds at least."""


def default_settings(work: Workload, x: Tensor, y: Tensor) -> tuple[Run, Run, float]:
    """Return a step that is measured when `Measure()` would, a plain one on the same model, and the measured share.

    Args:
        work: The model.
        x: Inputs.
        y: Targets.
    """
    defaults, n = ada.Measure(), len(x)
    part = min(n, defaults.max_examples or n)
    model, optimizer = work.fresh()
    instrument = ada.PerExample().open(model, Request())
    measure, leave = step_of(model, optimizer, x, y, instrument, part), step_of(model, optimizer, x, y)
    for _ in range(9):
        measure()
    sizes = StepSize(n, 1, part, 1, int(part < n))
    costs = instrument.costs(sizes, "cpu")
    trial, budget = MeasureBudget(defaults.max_overhead), MeasureBudget(defaults.max_overhead)
    share = sum(trial.due(*costs) for _ in range(SIMULATED)) / SIMULATED

    def run() -> object:
        return measure() if budget.due(*instrument.costs(sizes, "cpu")) else leave()

    return run, leave, share


def steps_of_a_run(work: Workload, share: float) -> int:
    """Return how many steps are timed together."""
    return max(work.steps, math.ceil(MEASUREMENTS / share))


def main() -> None:
    """Time all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="interleaved runs of each kind")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.default_settings", *sys.argv[1:]], os.environ | ALLOCATOR
        )
    torch.set_num_threads(options.threads)
    print(f"{options.rounds} interleaved runs; {machine()}", flush=True)
    print(
        "| model | plain, ms | control | share | steps a run | default settings |\n|---|---|---|---|---|---|",
        flush=True,
    )
    rows: dict[str, Any] = {}
    for name in options.models:
        work = MODELS[name]
        x, y = work.data(work.batch)
        run, plain, share = default_settings(work, x, y)
        runs = {"plain": plain, "control": plain, "default settings": run}
        steps = steps_of_a_run(work, share)
        times = interleaved(runs, options.rounds, steps)
        base = (median(times["plain"]) + median(times["control"])) / 2
        control, ratio = median(times["control"]) / median(times["plain"]), median(times["default settings"]) / base
        cells = f"{1e3 * base:.3f} | {control:.3f} | {share:.3f} | {steps} | {ratio:.3f}"
        print(f"| {name} b={work.batch} | {cells} |", flush=True)
        rows[name] = times
    print("written to", write_json("default_settings", {"rows": rows}))


if __name__ == "__main__":
    main()
