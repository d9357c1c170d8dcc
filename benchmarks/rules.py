"""Which rule for the learning rate goes with a batch at the noise scale, and at which fraction of it?

    python -m benchmarks.rules --data DIR [--tasks digits,logistic] [--optimizers sgd,adagrad,adamw] [--jobs 2]

The ablation behind `adadagrad.recommended`: every rule at every fraction, with the same three learning rates, on the
validation part with one seed, the one on which benchmarks/defaults.py tunes. A cell is the best metric over the three
rates and the steps that it took; the first rows are constant batches. Nothing here touches the test parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.defaults import CHOOSING_SEED
from benchmarks.machine import machine
from benchmarks.methods import RULES
from benchmarks.runs import Config, run_all
from benchmarks.tasks import OPTIMIZERS, TASKS, Task

FRACTIONS = (0.25, 1.0, 4.0)
"""Of the noise scale."""
GROWTH = 1.2
"""As in `adadagrad.recommended`."""


def methods(task: Task) -> list[str]:
    """Return constant batches, from small to large, and then every rule at every fraction.

    Args:
        task: Names its constant sizes.
    """
    constant = [f"constant {size}" for size in task.sizes]
    return [*constant, *(f"noise-{rule} {fraction:g} {GROWTH}" for fraction in FRACTIONS for rule in RULES)]


def best(task: Task, results: Sequence[dict[str, Any]]) -> str:
    """Return the best metric over learning rates, and its steps.

    Args:
        task: Says which way is better.
        results: One for each learning rate.

    Returns:
        For example ``"0.9788 in 552"``, or ``"diverged"``.
    """
    result = max(results, key=lambda r: task.score(r["metric"]))
    return "diverged" if result["metric"] is None else f"{result['metric']:.4f} in {result['steps']:,}"


def label(task: Task, method: str) -> str:
    """Return a method's row, the same for tasks of different constant sizes.

    Args:
        task: Its constant sizes, from small to large, are rows of the same name.
        method: Of `methods`.
    """
    name, number, *_ = method.split()
    if name == "constant":
        return ("small", "middle", "large")[task.sizes.index(int(number))] + " constant batch"
    return f"{number} B, {name.removeprefix('noise-')}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and print the table.

    Args:
        arguments: The command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with mnist/ and tinyshakespeare/")
    parser.add_argument("--tasks", default="digits,logistic")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    print(machine(), flush=True)
    columns: dict[str, dict[str, str]] = {}
    for name in options.tasks.split(","):
        for optimizer in options.optimizers.split(","):
            task = TASKS[name]
            rates = task.learning_rates[optimizer]
            configs = [Config(task, optimizer, lr, m, CHOOSING_SEED) for m in methods(task) for lr in rates]
            results = run_all(configs, options.data, options.jobs, "rules")
            cells = {
                label(task, method): best(task, results[k * len(rates) : (k + 1) * len(rates)])
                for k, method in enumerate(methods(task))
            }
            columns[f"{name}, {optimizer}"] = cells
    rows = list(dict.fromkeys(row for cells in columns.values() for row in cells))
    print(f"| batch, rule | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {row} | {' | '.join(cells.get(row, '') for cells in columns.values())} |")


if __name__ == "__main__":
    main()
