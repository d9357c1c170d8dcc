"""The tables of AdaScale, smaller: does a large batch end where the small one does, at the same measured progress?

    python -m benchmarks.reproduce.adascale --data DIR [--parts cnn gpt elastic] [--seeds 5] [--jobs 1] [--show]

`cnn` has the shape of the paper's CIFAR-10 table (arXiv 2007.05105, table 2): a base batch, a schedule and a budget;
then S base batches in each step, by AdaScale until the same scale-invariant progress, or by linear scaling with 5.5 %
warm-up until the same samples. Ours is a small network on MNIST (`benchmarks.tasks`, SGD with momentum 0.9, cosine in
progress), the paper's ResNet-18 on CIFAR-10 with exponential decay: shapes compare, numbers do not.

`gpt` asks the same of AdamW: gain^0.5 (AdamScale), the gain (AdaScale), and linear and square-root scaling.
`AccumulatorScale` is gain^0.5 at a constant batch, so it is in `elastic` only.

`elastic` changes S during the run: 1, then 16 from a quarter of the progress, then 4 from a half, as the paper's
ImageNet runs do. A policy sees samples and not progress, so the second change is at the samples that a run at S = 16
took from a quarter to a half, and the table says which progress that was. "deviation" is that of the validation loss
from the S = 1 curves of the other seeds, at equal progress after the first change: mean and largest; the first row is
what seeds alone do.

The base learning rate is the best of the task's three at S = 1 on the validation part, with one seed. Gains are
measured in every step, on at most 128 examples. Accuracy and loss are those of the test part, but for `elastic`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from benchmarks.reproduce.study import Result, Study, cell, of_method, options, table
from benchmarks.reproduce.tables import spread
from benchmarks.runs import Config
from benchmarks.tasks import TASKS, Task

PUBLISHED = {
    1: ("94.1", "39.1k", ".157"),
    8: ("94.1 / 94.0", "5.85k / 4.88k", ".153 / .161"),
    16: ("94.1 / 93.6", "3.36k / 2.44k", ".150 / .163"),
    32: ("94.1 / 92.8", "2.08k / 1.22k", ".145 / .177"),
    64: ("93.9 / 76.6", "1.41k / 611", ".140 / .272"),
}
"""CIFAR-10 by S, AdaScale / linear: accuracy in percent, iterations, final training loss."""
NUMBERS = (("steps", 0), ("train_loss", 4), ("samples", 0))
"""What the tables hold of a run beside its metric, with decimals."""
GPT_SCALES = (4, 16)
GPT_RULES = ("root-gain", "gain", "sqrt", "linear")
ELASTIC = {"cnn": ("sgd", ("gain", "linear")), "gpt": ("adamw", ("root-gain", "accumulator", "sqrt"))}
MIDDLE, LAST = 16, 4
"""S of the second and third stage of an elastic run."""


def base(task: Task) -> str:
    """Return the method at S = 1."""
    return f"constant {task.base_batch_size}"


def reported(study: Study, task: Task, optimizer: str, methods: Sequence[str], seeds: int) -> list[Result]:
    """Return runs on the test part at the learning rate that is best at S = 1, the first seed of all methods first."""
    chosen = study.choose(task, optimizer, [base(task)])
    return study.results(
        Config(task, optimizer, lr, method, seed, "test")
        for lr in chosen.values()
        for seed in range(seeds)
        for method in methods
    )


def cnn(study: Study, task: Task, seeds: int) -> str:
    """Return the table of accuracies by S, with the published ones."""
    names = {s: (f"scaled-gain {s}", f"scaled-linear {s}") if s > 1 else (base(task),) for s in PUBLISHED}
    results = reported(study, task, "sgd", [name for pair in names.values() for name in pair], seeds)
    rows = []
    for s, pair in names.items():
        runs = [of_method(results, name) for name in pair]
        both = [" / ".join(cell(group, key, digits) for group in runs) for key, digits in (("accuracy", 4), *NUMBERS)]
        rows.append([str(s), str(s * task.base_batch_size), *both, *PUBLISHED[s]])
    columns = ("test accuracy", "iterations", "training loss", "samples")
    headings = ["S", "batch", *(f"{name}, AdaScale / linear" for name in columns)]
    published = [f"published {name} (CIFAR-10)" for name in ("accuracy, %", "iterations", "training loss")]
    return table(headings + published, rows)


def gpt(study: Study, task: Task, seeds: int) -> str:
    """Return the table of losses by S and rule."""
    names = {base(task): ("1", "-")}
    names |= {f"scaled-{rule} {s}": (str(s), rule) for s in GPT_SCALES for rule in GPT_RULES}
    results = reported(study, task, "adamw", list(names), seeds)
    rows = []
    for name, about in names.items():
        runs = of_method(results, name)
        rows.append([*about, *(cell(runs, key, digits) for key, digits in (("loss", 4), *NUMBERS)), "not at hand"])
    return table(["S", "rule", "test loss", "iterations", "training loss", "samples", "published"], rows)


def elastic(study: Study, task: Task, seeds: int) -> str:
    """Return the table of deviations from the curve of S = 1."""
    optimizer, rules = ELASTIC[task.name]
    watched = replace(task, name=f"{task.name}-loss", metric="loss")
    rows = []
    for lr in study.choose(task, optimizer, [base(task)]).values():
        plain = study.results(Config(watched, optimizer, lr, base(task), seed) for seed in range(seeds))
        rows.append(["S = 1", *deviation_cells(plain, plain, task.budget), "-", cell(plain, "samples"), "not at hand"])
        counted = f"scaled-{rules[0]} {MIDDLE}"
        quarter = task.budget // 4
        for rule in rules:
            second = 2 * quarter
            if rule not in ("linear", "sqrt"):
                pace = study.results([Config(task, optimizer, lr, counted, 0, "test")])
                second = quarter + sum(samples_at(run, 2 * quarter) - samples_at(run, quarter) for run in pace)
            name = f"elastic-{rule} {MIDDLE} {LAST} {quarter} {second}"
            runs = study.results(Config(watched, optimizer, lr, name, seed) for seed in range(seeds))
            reached = [progress_at(run, second) / task.budget for run in runs]
            at = spread(reached, 3) if reached else "-"
            deviations = deviation_cells(runs, plain, task.budget)
            rows.append([f"{rule}, S = 1, 16, 4", *deviations, at, cell(runs, "samples"), "not at hand"])
    headings = ["run", "final val loss", "mean deviation", "largest deviation", "progress at the second change"]
    return table([*headings, "samples", "published"], rows)


def deviation_cells(runs: Sequence[Result], plain: Sequence[Result], budget: int) -> list[str]:
    """Return final loss and deviations over the seeds as text; ``"-"`` where there is nothing to compare with."""
    found = [
        deviation(run, [other for other in plain if other["seed"] != run["seed"]], budget / 4)
        for run in runs
        if not run["diverged"] and any(other["seed"] != run["seed"] for other in plain)
    ]
    return [cell(runs, "loss", 4), *(spread(values, 4) for values in zip(*found, strict=True))] if found else ["-"] * 3


def deviation(run: Result, others: Sequence[Result], start: float) -> tuple[float, float]:
    """Return mean and largest distance of a run's curve from the mean curve of others, at equal progress.

    Args:
        run: Its curve and progress.
        others: Those of the runs to compare with, at least one.
        start: Progress from which on they are compared [examples].
    """
    distances = [
        abs(point[-1] - mean(value_at(other, progress, -1) for other in others))
        for point, progress in zip(run["curve"], run["progress"], strict=True)
        if progress > start
    ]
    return mean(distances), max(distances)


def value_at(run: Result, progress: float, place: int) -> float:
    """Return what a curve holds at some progress, a straight line between two points and level beyond the ends."""
    return between(run["progress"], [point[place] for point in run["curve"]], progress)


def samples_at(run: Result, progress: float) -> int:
    """Return how many samples a run had used at some progress."""
    return round(value_at(run, progress, 0))


def progress_at(run: Result, samples: float) -> float:
    """Return the progress that a run had made after so many samples."""
    return between([point[0] for point in run["curve"]], run["progress"], samples)


def between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Return y at x on the line through points in order of x, level beyond the ends.

    Example:
        >>> [between([1, 3], [10, 20], x) for x in (0, 1, 2.5, 4)]
        [10, 10, 17.5, 20]
    """
    place = bisect_left(xs, x)
    if place in (0, len(xs)) or xs[place] == x:
        return ys[min(place, len(xs) - 1)]
    share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])


PARTS = {"cnn": cnn, "gpt": gpt, "elastic": elastic}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and print the tables.

    Args:
        arguments: The command line; None takes that of the process.
    """
    found = options(__doc__, list(PARTS), 5, arguments)
    study = Study("adascale", found.data, found.jobs, found.show)
    for part in found.parts:
        for name in ELASTIC if part == "elastic" else (part,):
            task = TASKS[name]
            print(f"\n{part}, {name}, budget {task.budget:,}", flush=True)
            print(f"\n{PARTS[part](study, task, found.seeds)}", flush=True)


if __name__ == "__main__":
    main()
