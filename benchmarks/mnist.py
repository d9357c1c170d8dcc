"""The paper's two MNIST experiments: does a batch that the gradient chooses help AdaGrad, and what does it cost?

    python -m benchmarks.mnist --data DIR [--model logistic|cnn] [--samples 600000] [--seeds 3] [--first-seed 0]
                               [--jobs 2] [--rows norm]

Settings of timlautk/AdAdaGrad (verified there): AdaGrad with lr 8e-3 constant, logistic regression from b=2, CNN
from b=8, cap 60,000, pixels / 255. The published runs use 6,000,000 samples and, for the CNN, four ranks; here one
process, and 600,000 samples unless asked otherwise. Published result tables were not at hand.

Seconds are processor seconds of one thread, so that other work on the machine counts little. Measuring is its share of
the wall-clock time: what only measuring does. A weight gradient that is formed example by example, for the norms, takes
the place of the ordinary one and counts as training; benchmarks/statistics.py shows what measuring costs in all.
`--jobs` trains so many seeds at a time, each in its own process. "last batch" is the planned size of the last step,
which the end of the budget may cut.
Tests use `Bounds.paper()` and measure every step on all examples, as the paper does, except where the row says
"default settings". Accuracy is on the 10,000 test images after the last step; nothing was tuned on them.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F

import adadagrad as ada
from adadagrad.cli.data import load_data
from adadagrad.cli.models import cnn, logistic
from adadagrad.policies import AbstractPolicy
from benchmarks.machine import machine, write_json

MODELS = {"logistic": (logistic, 2), "cnn": (cnn, 8)}
LEARNING_RATE = 8e-3
HEADINGS = (
    "| batch size by | steps | mean batch | last batch | samples | CPU seconds | of which measuring | test accuracy |\n"
    "|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Row:
    """A policy, and whether it is measured as in the paper or with the library's defaults."""

    name: str
    policy: AbstractPolicy
    paper: bool = True


ROWS = [
    Row("constant 64", ada.ConstantBatch(64)),
    Row("constant 256", ada.ConstantBatch(256)),
    Row("constant 1024", ada.ConstantBatch(1024)),
    Row("norm test, eta 0.1", ada.NormTest(eta=0.1)),
    Row("norm test, eta 0.25", ada.NormTest(eta=0.25)),
    Row("norm test, eta 0.5", ada.NormTest(eta=0.5)),
    Row("norm test, eta 0.5, default settings", ada.NormTest(eta=0.5), paper=False),
    Row("augmented, theta 0.5, nu 1", ada.AugmentedInnerProductTest(theta=0.5, nu=1.0)),
    Row("augmented, theta 0.9, nu 5.84", ada.AugmentedInnerProductTest(theta=0.9, nu=5.84)),
    Row("coordinate-wise, max, eta 0.5", ada.CoordinateNormTest(eta=0.5)),
    Row("coordinate-wise, median, eta 0.5", ada.CoordinateNormTest(eta=0.5, reduction="quantile", quantile=0.5)),
    Row("coordinate-wise, weighted, eta 0.5", ada.CoordinateNormTest(eta=0.5, reduction="weighted")),
]


def train(folder: str, model_name: str, row: Row, samples: int, seed: int) -> dict[str, float]:
    """Train once.

    Args:
        folder: Where the IDX files are.
        model_name: Key of `MODELS`.
        row: What chooses the batch size.
        samples: Budget.
        seed: Seeds model and order.

    Returns:
        The row's numbers.
    """
    torch.set_num_threads(1)
    data = load_data(f"mnist:{folder}")
    build, start = MODELS[model_name]
    torch.manual_seed(seed)
    model = build((1, 28, 28), 10)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=LEARNING_RATE)
    tested = bool(row.policy.needs)
    measure = ada.Measure(every=1, max_examples=None) if tested and row.paper else None
    engine = ada.AdaptiveBatch(
        model,
        optimizer,
        data.train,
        row.policy,
        global_batch_size=start if tested else None,
        max_batch_size=60_000,
        micro_batch_size=1000,
        total_samples=samples,
        measure=measure,
        bounds=ada.Bounds.paper() if tested else None,
        seed=seed,
    )
    started, processor = time.perf_counter(), time.process_time()
    last = 0
    for step in engine:
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        step.update()
        last = step.plan.global_batch_size
    share = engine.measuring.instrument.seconds / (time.perf_counter() - started)
    seconds = time.process_time() - processor
    return {
        "steps": engine.steps,
        "mean_batch": engine.samples_seen / engine.steps,
        "last_batch": last,
        "samples": engine.samples_seen,
        "seconds": seconds,
        "measuring": share * seconds,
        "accuracy": accuracy(model, data.held_out),
    }


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Any) -> float:
    """Return the share of test images classified rightly, 1000 at a time.

    Args:
        model: The trained model.
        data: The test set.

    Returns:
        Between 0 and 1.
    """
    images, labels = data.tensors
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return right / len(labels)


def over_seeds(pool: Executor, arguments: tuple[str, str, Row, int], seeds: Sequence[int]) -> dict[str, list[float]]:
    """Train one row once for each seed.

    Args:
        pool: Where to train.
        arguments: Of `train`, but for the seed.
        seeds: At least one.

    Returns:
        The row's numbers, each as a list in the order of the seeds.
    """
    runs = [job.result() for job in [pool.submit(train, *arguments, seed) for seed in seeds]]
    return {key: [run[key] for run in runs] for key in runs[0]}


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation over seeds as text.

    Args:
        values: One per seed.
        digits: Decimals.

    Returns:
        For example ``"0.918 ± 0.001"``; the mean alone where there is one seed.
    """
    text = f"{mean(values):,.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):,.{digits}f}"


def table_row(name: str, column: dict[str, list[float]]) -> str:
    """Return one line of the table.

    Args:
        name: What chose the batch size.
        column: The numbers of `train`, one per seed.

    Returns:
        The line, in the order of `HEADINGS`.
    """
    digits = {"steps": 0, "mean_batch": 0, "last_batch": 0, "samples": 0, "seconds": 1, "measuring": 1, "accuracy": 4}
    return f"| {name} | {' | '.join(spread(column[key], places) for key, places in digits.items())} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rows asked for and print the table.

    Args:
        arguments: The command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with the four MNIST IDX files")
    parser.add_argument("--model", choices=sorted(MODELS), default="logistic")
    parser.add_argument("--samples", type=int, default=600_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained at the same time")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be >= 1, got {options.seeds}")
    torch.set_num_threads(1)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    load_data(f"mnist:{options.data}")  # a wrong folder is named before any process starts
    print(f"{options.model}, {options.samples:,} samples, seeds {seeds[0]} to {seeds[-1]}; {machine()}", flush=True)
    print(HEADINGS, flush=True)
    found = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for row in ROWS:
            if options.rows not in row.name:
                continue
            column = over_seeds(pool, (options.data, options.model, row, options.samples), seeds)
            found[row.name] = column
            print(table_row(row.name, column), flush=True)
    name = f"mnist-{options.model}-{options.samples}-seeds-{seeds[0]}-{seeds[-1]}"
    name += "-".join(["", *re.findall(r"[a-z0-9.]+", options.rows)])
    print("written to", write_json(name, {"seeds": list(seeds), "rows": found}))


if __name__ == "__main__":
    main()
