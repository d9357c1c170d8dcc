"""A study: learning rates are chosen on the validation part, results are those of the test part, both are read back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.reproduce.tables import spread
from benchmarks.runs import Config, run_all
from benchmarks.tasks import Task

Result = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Where a study's runs are kept, and whether more of them are trained.

    Args:
        name: Folder below ``results/``.
        folder: Where the data lies.
        jobs: Runs trained at the same time.
        show: Take what has been trained so far, and train nothing.
    """

    name: str
    folder: str
    jobs: int = 1
    show: bool = False

    def results(self, configs: Iterable[Config]) -> list[Result]:
        """Return the results of these runs, in their order; with `show` of those that are there.

        Args:
            configs: The runs; each is trained once, and not at all where its file exists.
        """
        wanted = list(configs)
        if not self.show:
            return run_all(wanted, self.folder, self.jobs, self.name)
        paths = [Path("results") / self.name / f"{config.key}.json" for config in wanted]
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def choose(self, task: Task, optimizer: str, methods: Sequence[str], seed: int = 0) -> dict[str, float]:
        """Return each method's best learning rate of the task's, by one run each on the validation part.

        Args:
            task: What is trained.
            optimizer: Key of the task's learning rates.
            methods: Names as in `Config`.
            seed: Of the run.

        Returns:
            By method; without those of which no run is there, or none ended.
        """
        rates = task.learning_rates[optimizer]
        tried = [Config(task, optimizer, lr, method, seed) for method in methods for lr in rates]
        best: dict[str, Result] = {}
        for result in self.results(tried):
            before = best.get(result["method"], {"metric": None})
            if task.score(result["metric"]) > task.score(before["metric"]):
                best[result["method"]] = result
        return {method: result["lr"] for method, result in best.items()}


def of_method(results: Iterable[Result], method: str) -> list[Result]:
    """Return a method's results, one a seed."""
    return [result for result in results if result["method"] == method]


def cell(runs: Sequence[Result], key: str, digits: int = 0) -> str:
    """Return mean and standard deviation of a number over the seeds that did not diverge, as text.

    Args:
        runs: Of one method.
        key: Of the number.
        digits: Decimals.

    Returns:
        ``"-"`` where there is no run, ``"diverged"`` where all of them did.
    """
    there = [run[key] for run in runs if not run["diverged"]]
    if not there:
        return "diverged" if runs else "-"
    return spread(there, digits) + ("" if len(there) == len(runs) else f" ({len(there)} of {len(runs)})")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in markdown.

    Args:
        headings: Of the columns.
        rows: As many cells each.

    Example:
        >>> print(table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [f"| {' | '.join(row)} |" for row in [headings, *rows]]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


def options(doc: str, parts: Sequence[str], seeds: int, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line that all studies share, and print what they were run on.

    Args:
        doc: The study's docstring.
        parts: What it consists of.
        seeds: How many there are unless asked otherwise.
        arguments: The command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", default="", help="folder that holds mnist/ and tinyshakespeare/")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--jobs", type=int, default=1, help="runs trained at the same time")
    parser.add_argument("--show", action="store_true", help="print what has been written instead of training")
    found = parser.parse_args(arguments)
    if found.seeds < 1:
        parser.error(f"--seeds must be >= 1, got {found.seeds}")
    print(f"seeds 0 to {found.seeds - 1}, one thread a run; {machine()}", flush=True)
    return found
