"""The paper's two MNIST experiments: does a batch that the gradient chooses help AdaGrad, and what does it cost?

    python -m benchmarks.reproduce.adadagrad --data DIR [--model logistic|cnn] [--optimizer adagrad|adagrad-norm]
                                             [--samples N] [--seeds 3] [--first-seed 0] [--jobs 2] [--rows NAME ...]
    ... --data DIR --choose-lr    the learning rates that were tried for AdaGrad-Norm
    ... --show                    the table of what has been written so far
    ... --draw                    accuracy against steps and against seconds, as a picture

Settings of timlautk/AdAdaGrad (verified there): AdaGrad with lr 8e-3 constant, logistic regression from b=2, CNN
from b=8, cap 60,000, pixels / 255. The published runs use 6,000,000 samples and, for the CNN, four ranks; here one
process, and for the CNN 600,000 samples unless asked otherwise. Published result tables were not at hand.

The paper's learning rate for AdaGrad-Norm was not at hand either. `--choose-lr` tries some at a constant batch of 64 on
the training images without the last 5,000, and judges them by those; `LEARNING_RATES` holds its choice. For logistic
regression and 6,000,000 samples 1, 3, 10 and 30 gave 0.9396, 0.9412, 0.9420 and 0.9412 (seed 0). None has been chosen
for the CNN yet.

Seconds are processor seconds of one thread, so that other work on the machine counts little. Measuring is its share of
each step's wall-clock time: what only measuring does. A weight gradient that is formed example by example, for the
norms, takes the place of the ordinary one and counts as training; benchmarks/statistics.py shows what measuring costs
in all. `--jobs` trains so many seeds at a time, each in its own process. "last batch" is the planned size of the last
step, which the end of the budget may cut. Tests use `Bounds.paper()` and measure every step on all examples, as the
paper does, except where the row says "default settings".

Accuracy is on the 10,000 test images, on which nothing was tuned, after the last step; along the way at 30 evenly
spaced sample counts and, within the first thirtieth, at its halves, quarters and so on. That takes no part in the
seconds. What it costs to reach an accuracy is read at the first of these points that has it. Each run is written under
results/ as soon as it is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import adadagrad as ada
from adadagrad.cli.data import load_data
from benchmarks.machine import machine
from benchmarks.reproduce import curves, tables
from benchmarks.reproduce.training import EXPERIMENTS, OPTIMIZERS, Row, Run, train

ROWS = [
    Row("constant 64", ada.ConstantBatch(64)),
    Row("constant 256", ada.ConstantBatch(256)),
    Row("constant 1024", ada.ConstantBatch(1024)),
    Row("norm test, eta 0.1", ada.NormTest(eta=0.1)),
    Row("norm test, eta 0.25", ada.NormTest(eta=0.25)),
    Row("norm test, eta 0.5", ada.NormTest(eta=0.5)),
    Row("norm test, eta 0.5, default settings", ada.NormTest(eta=0.5), paper=False),
    Row("augmented, theta 0.5, nu 1", ada.AugmentedInnerProductTest(theta=0.5, nu=1.0)),
    Row("coordinate-wise, max, eta 0.5", ada.CoordinateNormTest(eta=0.5)),
    Row("coordinate-wise, median, eta 0.5", ada.CoordinateNormTest(eta=0.5, reduction="quantile", quantile=0.5)),
    Row("coordinate-wise, weighted, eta 0.5", ada.CoordinateNormTest(eta=0.5, reduction="weighted")),
    Row("augmented, theta 0.9, nu 5.84", ada.AugmentedInnerProductTest(theta=0.9, nu=5.84)),
]

LEARNING_RATES = {
    ("logistic", "adagrad"): 8e-3,
    ("cnn", "adagrad"): 8e-3,
    ("logistic", "adagrad-norm"): 10.0,
}
TRIED = (1.0, 3.0, 10.0, 30.0)
VALIDATION = 5000


def rows_named(names: Sequence[str], optimizer: str) -> list[Row]:
    """Return the rows to train, in the order of the names.

    Args:
        names: Each the name of a row, or a part of the names of several; none stands for all rows.
        optimizer: AdaGrad-Norm has no second moment for each coordinate, and so not the row that weights with it.

    Returns:
        Each row once; empty where no name fits.
    """
    there = [row for row in ROWS if optimizer == "adagrad" or "weighted" not in row.name]
    found: dict[str, Row] = {}
    for name in names or [""]:
        exact = [row for row in there if row.name == name]
        found.update({row.name: row for row in exact or there if name in row.name and row.name not in found})
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is asked for: train and print the table, or print or draw what is there.

    Args:
        arguments: The command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with the four MNIST IDX files")
    parser.add_argument("--model", choices=sorted(EXPERIMENTS), default="logistic")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="adagrad")
    parser.add_argument("--samples", type=int, help="budget; the paper's for logistic, a tenth of it for cnn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained at the same time")
    parser.add_argument("--rows", nargs="+", default=[], help="rows by name or part of it, in this order")
    parser.add_argument("--choose-lr", action="store_true", help="try learning rates on a validation split instead")
    parser.add_argument("--show", action="store_true", help="print what has been written instead of training")
    parser.add_argument("--draw", action="store_true", help="draw what has been written instead of training")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be >= 1, got {options.seeds}")
    if options.samples is None:
        options.samples = EXPERIMENTS[options.model].samples
    rows = rows_named(options.rows, options.optimizer)
    if not rows:
        parser.error(f"--rows {options.rows}: no such row; there are {[row.name for row in ROWS]}")
    torch.set_num_threads(1)
    if options.show or options.draw:
        runs = tables.read(options.model, options.optimizer, options.samples)
        written = {row.name: runs[row.name] for row in rows if row.name in runs}
        if not written:
            parser.error(f"results/ holds no run of {_title(options)} in these rows: train it first")
        (_draw if options.draw else _show)(options, written)
        return
    if options.data is None:
        parser.error("--data must name the folder with the four MNIST IDX files")
    if (options.model, options.optimizer) not in LEARNING_RATES and not options.choose_lr:
        parser.error(f"no learning rate is chosen for {_title(options)}: try --choose-lr, and set LEARNING_RATES")
    load_data(f"mnist:{options.data}")  # a wrong folder is named before any process starts
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        if options.choose_lr:
            _choose(options, pool)
        else:
            _train(options, rows, pool)


def _title(options: argparse.Namespace) -> str:
    return f"{options.model}, {options.optimizer}, {options.samples:,} samples"


def _run(options: argparse.Namespace, row: Row, seed: int, lr: float, validation: int = 0) -> Run:
    return Run(
        folder=options.data,
        model=options.model,
        optimizer=options.optimizer,
        lr=lr,
        row=row,
        samples=options.samples,
        seed=seed,
        validation=validation,
    )


def _train(options: argparse.Namespace, rows: Sequence[Row], pool: ProcessPoolExecutor) -> None:
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    lr = LEARNING_RATES[options.model, options.optimizer]
    print(f"{_title(options)}, lr {lr:g}, seeds {seeds[0]} to {seeds[-1]}; {machine()}", flush=True)
    print(tables.headings(options.model), flush=True)
    for row in rows:
        runs = [_run(options, row, seed, lr) for seed in seeds]
        done = []
        for run, job in [(run, pool.submit(train, run)) for run in runs]:
            done.append({"row": row.name, **job.result()})
            tables.write(run, done[-1])
        print(tables.table_row(options.model, done), flush=True)


def _choose(options: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
    print(
        f"{_title(options)}, constant 64, seed {options.first_seed}; accuracy on the last {VALIDATION} training images"
    )
    runs = [_run(options, ROWS[0], options.first_seed, lr, VALIDATION) for lr in TRIED]
    for run, job in [(run, pool.submit(train, run)) for run in runs]:
        print(f"lr {run.lr:g}: {job.result()['accuracy']:.4f}", flush=True)


def _show(options: argparse.Namespace, written: dict[str, list[dict[str, Any]]]) -> None:
    seeds = {row: [run["seed"] for run in runs] for row, runs in written.items()}
    whole = max(seeds.values(), key=len)
    print(f"{_title(options)}, seeds {whole}\n{tables.headings(options.model)}")
    for runs in written.values():
        print(tables.table_row(options.model, runs))
    for row, those in seeds.items():
        if those != whole:
            print(f"only seeds {those}: {row}")


def _draw(options: argparse.Namespace, written: dict[str, list[dict[str, Any]]]) -> None:
    file = Path("results") / f"{tables.folder(options.model, options.optimizer, options.samples)}.png"
    file.write_bytes(curves.draw(written, _title(options)))
    print("written to", file)


if __name__ == "__main__":
    main()
