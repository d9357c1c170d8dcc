"""Runs that are kept: each is made once, in processes that share the work, and read back from its file afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

Result = dict[str, Any]
Run = Callable[..., Result]
"""Takes plain values by name, and returns plain values by name."""


def results(study: str, run: Run, wanted: Iterable[dict[str, Any]], jobs: int = 1) -> list[Result]:
    """Return the results of runs, in their order; those that have a file below ``results/`` are not made again.

    Args:
        study: The folder's name.
        run: Module-level function.
        wanted: The arguments of each run, plain values.
        jobs: Processes, each with one thread.
    """
    settings = list(wanted)
    missing = [one for one in settings if not _path(study, one).exists()]
    if missing and jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            list(pool.map(_make, [study] * len(missing), [run] * len(missing), missing))
    else:
        for one in missing:
            _make(study, run, one)
    return [json.loads(_path(study, one).read_text()) for one in settings]


def tuned(
    study: str,
    run: Run,
    arms: Sequence[dict[str, Any]],
    rates: Callable[[dict[str, Any]], Sequence[float]],
    *,
    higher: bool,
    jobs: int,
    step: float,
    beyond: int = 1,
    seed: int = 100,
) -> list[tuple[float, bool]]:
    """Return the best learning rate of each arm on the validation part, with a seed that no reported run has.

    Where the best is the smallest or largest so far, one more beyond it is tried, as often as `beyond` says.

    Args:
        study: The folder's name.
        run: Takes an arm's values, `lr`, `seed` and ``part="val"``, and returns a ``metric``, None where it diverged.
        arms: Plain values that tell them apart.
        rates: The learning rates of an arm, rising.
        higher: Whether a larger metric is better.
        jobs: Processes.
        step: Factor from one rate to the next, for those beyond.
        beyond: How many of these there may be.
        seed: Of these runs.

    Returns:
        For each arm its rate, and whether it lies at the edge of all that was tried.
    """
    grids = [sorted(rates(arm)) for arm in arms]
    found: list[dict[float, float]] = [{} for _ in arms]
    for _ in range(1 + beyond):
        wanted = [(index, lr) for index, grid in enumerate(grids) for lr in grid if lr not in found[index]]
        runs = [{**arms[index], "lr": lr, "seed": seed, "part": "val"} for index, lr in wanted]
        for (index, lr), result in zip(wanted, results(study, run, runs, jobs), strict=True):
            metric = result["metric"]
            score = -math.inf if metric is None or not math.isfinite(metric) else metric if higher else -metric
            found[index][lr] = score
        for index, grid in enumerate(grids):
            best = max(grid, key=lambda lr, index=index: found[index][lr])  # type: ignore[misc]
            if best == grid[0]:
                grids[index] = [float(f"{best / step:.3g}"), *grid]
            elif best == grid[-1]:
                grids[index] = [*grid, float(f"{best * step:.3g}")]
    answers = []
    for scores in found:
        best = max(scores, key=lambda lr: scores[lr])
        answers.append((best, best in (min(scores), max(scores))))
    return answers


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Return mean and standard deviation of what did not diverge, and how many did.

    Args:
        values: Of the seeds.
        digits: After the point.
    """
    fine = [value for value in values if value is not None and math.isfinite(value)]
    if not fine:
        return "diverged"
    lost = f" ({len(values) - len(fine)} diverged)" if len(fine) < len(values) else ""
    deviation = stdev(fine) if len(fine) > 1 else 0.0
    return f"{mean(fine):.{digits}f} ± {deviation:.{digits}f}{lost}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table.

    Args:
        heads: Of the columns.
        rows: Cells.
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _path(study: str, settings: dict[str, Any]) -> Path:
    name = "-".join(f"{key}={value}" for key, value in sorted(settings.items()) if key != "data")
    return Path("results") / "companions" / study / f"{name}.json"


def _make(study: str, run: Run, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    path = _path(study, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {**settings, **run(**settings)}
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result) + "\n")
    beside.replace(path)
