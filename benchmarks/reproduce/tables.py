"""Runs as JSON files, one each, and the table that is made of those that are there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.machine import write_json
from benchmarks.reproduce.training import EXPERIMENTS, Run

COLUMNS = {"steps": 0, "mean_batch": 0, "last_batch": 0, "seconds": 1, "measuring": 1, "accuracy": 4}
"""The numbers of `training.train` in the table's order, with decimals."""


def folder(model: str, optimizer: str, samples: int) -> str:
    """Return the folder of one table's runs, below results/.

    Args:
        model: Key of `EXPERIMENTS`.
        optimizer: Key of `OPTIMIZERS`.
        samples: Budget.

    Returns:
        For example ``"adadagrad/logistic-adagrad-6000000"``.
    """
    return f"adadagrad/{model}-{optimizer}-{samples}"


def write(run: Run, numbers: dict[str, Any]) -> Path:
    """Write one run; an earlier one of the same row and seed is replaced.

    Args:
        run: What was trained.
        numbers: What `training.train` returned.

    Returns:
        The file's path.
    """
    name = "-".join([*re.findall(r"[a-z0-9.]+", run.row.name), "seed", str(run.seed)])
    content = {"row": run.row.name, "seed": run.seed, "lr": run.lr, **numbers}
    return write_json(f"{folder(run.model, run.optimizer, run.samples)}/{name}", content)


def read(model: str, optimizer: str, samples: int) -> dict[str, list[dict[str, Any]]]:
    """Read the runs of one table that have been written so far.

    Args:
        model: As in `folder`.
        optimizer: As in `folder`.
        samples: As in `folder`.

    Returns:
        By row, in the order of the seeds; empty where there are none.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    files = (Path("results") / folder(model, optimizer, samples)).glob("*-seed-*.json")
    for run in sorted((json.loads(file.read_text()) for file in files), key=lambda run: run["seed"]):
        rows.setdefault(run["row"], []).append(run)
    return rows


def headings(model: str) -> str:
    """Return the first two lines of the table.

    Args:
        model: Key of `EXPERIMENTS`, which says what accuracy is to be reached.

    Returns:
        Markdown.
    """
    target = f"{EXPERIMENTS[model].target:.2f}"
    names = ["batch size by", "steps", "mean batch", "last batch", "CPU seconds", "of which measuring", "test accuracy"]
    names += [f"steps to {target}", f"CPU seconds to {target}", "published"]
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def table_row(model: str, runs: Sequence[dict[str, Any]]) -> str:
    """Return one line of the table.

    Args:
        model: Key of `EXPERIMENTS`.
        runs: Of one row, at least one.

    Returns:
        The line, in the order of `headings`.
    """
    cells = [runs[0]["row"]]
    cells += [spread([run[key] for run in runs], digits) for key, digits in COLUMNS.items()]
    reached = [reach(run["curve"], EXPERIMENTS[model].target) for run in runs]
    for place, digits in ((0, 0), (1, 1)):
        found = [at[place] for at in reached if at]
        some = f" ({len(found)} of {len(runs)})" if 0 < len(found) < len(runs) else ""
        cells.append(spread(found, digits) + some if found else "-")
    return f"| {' | '.join([*cells, 'not at hand'])} |"


def reach(curve: Sequence[Sequence[float]], target: float) -> tuple[float, float] | None:
    """Return steps and CPU seconds at the first evaluation that reaches an accuracy.

    Args:
        curve: (samples, steps, CPU seconds, accuracy), in order.
        target: The accuracy.

    Returns:
        None where it is never reached.

    Example:
        >>> reach([(100, 10, 0.5, 0.8), (200, 12, 0.7, 0.91), (300, 14, 0.9, 0.89)], 0.9)
        (12, 0.7)
    """
    return next(((steps, seconds) for _, steps, seconds, accuracy in curve if accuracy >= target), None)


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation over seeds as text.

    Args:
        values: One per seed.
        digits: Decimals.

    Returns:
        For example ``"0.918 ± 0.001"``; the mean alone where there is one seed.
    """
    text = f"{mean(values):,.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):,.{digits}f}"
