"""A default that wins? Constant batches, the paper's test and the recommended choice at equal samples.

    python -m benchmarks.defaults --data DIR [--tasks digits,logistic] [--optimizers sgd] [--seeds 5] [--jobs 2]
                                  [--short-seeds 2] [--picture docs/pictures/defaults.png]

Every method gets the same three learning rates, those of the task (benchmarks/tasks.py), and is tuned with one seed on
the validation part; so is the best constant batch size. Then each is trained with other seeds, and the test part is
looked at once. All runs of a task see the same number of samples, with a cosine schedule in samples. An interrupted
study goes on where it was, and a finished one prints its table again.

Three questions are answered for each task and optimizer. Does the recommended choice end within the spread over seeds
of the best constant batch, that is, its mean worse by no more than the standard deviation of the difference between
two runs? Does it take an eighth of its steps or fewer? And does any constant batch size reach its quality in less
processor time, also with a half or a quarter of the samples?
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.defaults_picture import draw
from benchmarks.machine import machine
from benchmarks.runs import Config, run_all
from benchmarks.tasks import OPTIMIZERS, TASKS, Task

CHOOSING_SEED = 100
"""On which everything is tuned; reported are the seeds from 0."""
PAPER, WINNER = "paper 0.5", "recommended"
PARTS = (0.5, 0.25)
"""Shorter budgets with which constant batches are timed as well, for the third question."""
HEADINGS = (
    "| task, optimizer | best constant | steps | paper's test | steps | recommended | steps | fewer steps | CPU s, "
    "constant | CPU s, recommended | CPU s, any constant as good | as good | 1/8 of the steps | less time |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Entry:
    """A method on a task with an optimizer, tuned, and its results over seeds.

    Args:
        method: Name in `benchmarks.methods`.
        lr: The learning rate that was best on the validation part.
        chosen_by: The validation metric with it.
        runs: Results on the test part, one for each seed.
    """

    method: str
    lr: float
    chosen_by: float
    runs: Sequence[dict[str, Any]]

    def mean(self, name: str) -> float:
        """Return the mean of a number over seeds; infinite loss or zero accuracy where a run diverged."""
        return mean(run[name] for run in self.runs)

    @property
    def spread(self) -> float:
        """Standard deviation of the metric over seeds; 0 for a single one."""
        return stdev(run["metric"] for run in self.runs) if len(self.runs) > 1 else 0.0


class Study:
    """All runs of one task with one optimizer.

    Args:
        task: What is trained.
        optimizer: Key of `OPTIMIZERS`.
        folder: Where the data lies.
        jobs: Processes at the same time.
        seeds: How many are reported.
        short_seeds: How many are trained with shorter budgets.
    """

    def __init__(
        self, task: Task, optimizer: str, folder: str, jobs: int = 1, seeds: int = 5, short_seeds: int = 2
    ) -> None:
        self.task, self.optimizer, self.folder, self.jobs = task, optimizer, folder, jobs
        self.seeds, self.short_seeds = seeds, short_seeds
        self.constants = [f"constant {size}" for size in task.sizes]
        self.methods = [*self.constants, PAPER, WINNER]

    def run(self) -> tuple[list[Entry], list[Entry]]:
        """Tune, train and return one entry for each method, and those of constant batches with shorter budgets."""
        tuned = self._tuned()
        entries = self._report(tuned, self.task, self.methods, range(self.seeds))
        short: list[Entry] = []
        for part in PARTS:
            task = replace(self.task, budget=int(self.task.budget * part))
            short += self._report(tuned, task, self.constants, range(self.short_seeds))
        return entries, short

    def _tuned(self) -> dict[str, tuple[float, float]]:
        """Return the best learning rate of each method, and its metric on the validation part."""
        rates = self.task.learning_rates[self.optimizer]
        configs = [
            Config(self.task, self.optimizer, lr, method, CHOOSING_SEED, "val")
            for method in self.methods
            for lr in rates
        ]
        found: dict[str, list[tuple[float, float]]] = {method: [] for method in self.methods}
        for config, result in zip(configs, self._train(configs), strict=True):
            found[config.method].append((self.task.score(result["metric"]), config.lr))
        return {method: (lr, score) for method, (score, lr) in ((m, max(pairs)) for m, pairs in found.items())}

    def _report(
        self, tuned: dict[str, tuple[float, float]], task: Task, methods: Iterable[str], seeds: Sequence[int]
    ) -> list[Entry]:
        configs = [Config(task, self.optimizer, tuned[m][0], m, seed, "test") for m in methods for seed in seeds]
        results = self._train(configs)
        for result in results:
            if result["metric"] is None:  # diverged: as bad as can be
                result["metric"] = 0.0 if task.higher_is_better else math.inf
        each = len(seeds)
        return [Entry(method, *tuned[method], results[k * each : (k + 1) * each]) for k, method in enumerate(methods)]

    def _train(self, configs: Sequence[Config]) -> list[dict[str, Any]]:
        return run_all(configs, self.folder, self.jobs, "defaults")


def table_row(study: Study, entries: Sequence[Entry], short: Sequence[Entry]) -> str:
    """Return one line of the table.

    Args:
        study: Task and optimizer.
        entries: Of all methods.
        short: Of constant batches with shorter budgets.

    Returns:
        The line, in the order of `HEADINGS`.
    """
    task = study.task
    by_method = {entry.method: entry for entry in entries}
    constants = [by_method[method] for method in study.constants]
    best, paper, winner = max(constants, key=lambda e: e.chosen_by), by_method[PAPER], by_method[WINNER]
    fewer = best.mean("steps") / winner.mean("steps")
    good = as_good(task, winner, best)
    rivals = [e for e in (*constants, *short) if task.score(e.mean("metric")) >= task.score(winner.mean("metric"))]
    quickest = min((e.mean("cpu_seconds") for e in rivals), default=math.inf)
    cells = [
        f"{task.name}, {study.optimizer}",
        f"{best.method.split()[1]}: {quality(best)}",
        f"{best.mean('steps'):,.0f}",
        quality(paper),
        f"{paper.mean('steps'):,.0f}",
        quality(winner),
        f"{winner.mean('steps'):,.0f}",
        f"{fewer:.1f}",
        f"{best.mean('cpu_seconds'):.1f}",
        f"{winner.mean('cpu_seconds'):.1f}",
        "none" if math.isinf(quickest) else f"{quickest:.1f}",
        *("yes" if answer else "no" for answer in (good, fewer >= 8, winner.mean("cpu_seconds") < quickest)),
    ]
    return f"| {' | '.join(cells)} |"


def as_good(task: Task, entry: Entry, best: Entry) -> bool:
    """Return whether a method's mean is worse than another's by no more than two single runs differ.

    Args:
        task: Says which way is better.
        entry: The method in question.
        best: What it is compared with.

    """
    worse = task.score(best.mean("metric")) - task.score(entry.mean("metric"))
    return worse <= math.hypot(entry.spread, best.spread)


def quality(entry: Entry) -> str:
    """Return mean and standard deviation of the metric over seeds."""
    return f"{entry.mean('metric'):.4f} ± {entry.spread:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print its table.

    Args:
        arguments: The command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with mnist/ and tinyshakespeare/")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--short-seeds", type=int, default=2, help="seeds of the runs with shorter budgets")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--picture", type=Path, help="PNG file to draw quality against steps into")
    options = parser.parse_args(arguments)
    print(machine(), flush=True)
    rows, found = [], []
    for name in options.tasks.split(","):
        for optimizer in options.optimizers.split(","):
            settings = (options.data, options.jobs, options.seeds, options.short_seeds)
            study = Study(TASKS[name], optimizer, *settings)
            entries, short = study.run()
            rows.append(table_row(study, entries, short))
            found.append((study, entries))
            print(rows[-1], flush=True)
    print("\n".join([HEADINGS, *rows]))
    if options.picture is not None:
        options.picture.write_bytes(draw(found))


if __name__ == "__main__":
    main()
