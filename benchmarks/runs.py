"""Training runs of `benchmarks.tasks`: one configuration, one result in a JSON file, many at a time.

A run whose file exists is not trained again, so that an interrupted study goes on where it was. Seconds are processor
seconds of one thread, without evaluation, so that other work on the machine counts little. Measuring is its share of
the wall-clock time, as in benchmarks/mnist.py.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import adadagrad as ada
from adadagrad.core.errors import NonFiniteGradient
from adadagrad.report.thinning import thin
from benchmarks.machine import machine
from benchmarks.methods import arguments
from benchmarks.splits import evenly
from benchmarks.tasks import OPTIMIZERS, Task

VERSION = 1
"""Of what a run does: raise it when tasks, engine or result change, and old files no longer count."""
EVALUATIONS = 20
FEW = 2000
"""Examples of the split on which the curve is evaluated, at most; the final result is that of all."""
POINTS = 100
"""Of a trace, at most."""
UNTUNED = {"plain-sgd": torch.optim.SGD}
"""Optimizers for which a study brings learning rates of its own."""


@dataclass(frozen=True)
class Config:
    """One run.

    Args:
        task: What is trained.
        optimizer: Key of `OPTIMIZERS`, or of `UNTUNED`.
        lr: Learning rate at the start; a cosine to 0 follows, unless the method brings a schedule.
        method: A word of `benchmarks.methods.METHODS` and its numbers, as in ``"norm 0.5"``.
        seed: Seeds model and order.
        split: Part of the data that is evaluated, ``"val"`` or ``"test"``.
    """

    task: Task
    optimizer: str
    lr: float
    method: str
    seed: int = 0
    split: str = "val"

    @property
    def key(self) -> str:
        """The name of the result's file, without ending: all that tells this run from others."""
        method = "-".join(re.findall(r"[a-z0-9.]+", self.method))
        what = f"{self.task.name}-{self.task.budget}-{self.optimizer}-lr-{self.lr:g}-{method}"
        return f"{what}-seed-{self.seed}-{self.split}-v{VERSION}"


def train(config: Config, folder: str) -> dict[str, Any]:
    """Train once, on one thread.

    Args:
        config: What to train.
        folder: Where the data lies.

    Returns:
        Plain values. `metric`, `loss` and `accuracy` are those of the whole split at the end, None where the run
        diverged, and `train_loss` that of at most `FEW` examples of the training part; `curve` holds (samples, steps,
        CPU seconds, metric on at most `FEW` examples) at evenly spaced progress, `progress` where each point lies
        [examples], `batch_sizes` and `learning_rates` pairs (samples before the step, value).
    """
    torch.set_num_threads(1)
    task, splits = config.task, config.task.data(folder)
    held_out = {"val": splits.val, "test": splits.test}[config.split]
    few = evenly(held_out, FEW)
    model = task.build(config.seed)
    engine = ada.AdaptiveBatch(
        model,
        {**OPTIMIZERS, **UNTUNED}[config.optimizer](model.parameters(), lr=config.lr),
        splits.train,
        total_samples=task.budget,
        micro_batch_size=task.micro_batch_size,
        on_nonfinite="stop",
        seed=config.seed,
        **{"lr_schedule": ada.CosineSchedule(), **arguments(config.method, task, config.optimizer)},
    )
    curve: list[tuple[int, int, float, float | None]] = []
    progress, sizes, rates = [], [], []
    cpu = wall = 0.0
    mark, diverged = 0, False
    processor, started = time.process_time(), time.perf_counter()
    try:
        for step in engine:
            before = step.samples_seen
            step.run(lambda batch: task.loss(model, batch))
            decision = step.update()
            sizes.append((before, step.plan.global_batch_size))
            rates.append((before, decision.lr))
            if engine.progress * EVALUATIONS // task.budget > mark:
                mark = int(engine.progress * EVALUATIONS // task.budget)
                progress.append(engine.progress)
                cpu, wall = cpu + time.process_time() - processor, wall + time.perf_counter() - started
                curve.append((engine.samples_seen, engine.steps, cpu, finite(task.evaluate(model, few)[task.metric])))
                processor, started = time.process_time(), time.perf_counter()
    except NonFiniteGradient:
        diverged = True
        cpu, wall = cpu + time.process_time() - processor, wall + time.perf_counter() - started
    final = {**task.evaluate(model, held_out), "train_loss": task.evaluate(model, evenly(splits.train, FEW))["loss"]}
    diverged = diverged or not math.isfinite(final["loss"])
    return {
        "machine": machine(),
        "version": VERSION,
        "task": task.name,
        "budget": task.budget,
        **{name: getattr(config, name) for name in ("optimizer", "lr", "method", "seed", "split")},
        "steps": engine.steps,
        "samples": engine.samples_seen,
        "mean_batch": engine.samples_seen / engine.steps,
        "diverged": diverged,
        "metric": None if diverged else final[task.metric],
        **{name: None if diverged else value for name, value in final.items()},
        "cpu_seconds": cpu,
        "measuring_seconds": cpu * engine.measuring.instrument.seconds / wall,
        "curve": curve,
        "progress": progress,
        "batch_sizes": thin(sizes, POINTS),
        "learning_rates": thin(rates, POINTS),
    }


def finite(value: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return value if math.isfinite(value) else None


def keep(config: Config, folder: str, path: Path) -> dict[str, Any]:
    """Train, and write the result: whole or not at all.

    Args:
        config: What to train.
        folder: Where the data lies.
        path: The result's file.
    """
    result = train(config, folder)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result, allow_nan=False) + "\n")
    unfinished.replace(path)
    return result


def run_all(configs: Sequence[Config], folder: str, jobs: int, out: str) -> list[dict[str, Any]]:
    """Train every configuration that has no result yet, and keep each result as soon as it is there.

    Args:
        configs: What to train.
        folder: Where the data lies.
        jobs: Processes at the same time.
        out: Name of the folder below ``results/``.

    Returns:
        The results in the order of `configs`, as read from their files.
    """
    place = Path("results") / out
    place.mkdir(parents=True, exist_ok=True)
    paths = {config.key: place / f"{config.key}.json" for config in configs}
    missing = {config.key: config for config in configs if not paths[config.key].exists()}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(keep, config, folder, paths[key]): key for key, config in missing.items()}
        try:
            for count, job in enumerate(as_completed(waiting), 1):
                print(f"{count}/{len(missing)} {line(waiting[job], job.result())}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [json.loads(paths[config.key].read_text()) for config in configs]


def line(key: str, result: dict[str, Any]) -> str:
    """Return what is printed of a run."""
    metric = "diverged" if result["metric"] is None else f"{result['metric']:.4f}"
    return f"{key}: {metric}, {result['steps']:,} steps, {result['cpu_seconds']:.1f} CPU s"
