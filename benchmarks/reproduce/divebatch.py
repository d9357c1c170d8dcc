"""The small experiments of DiveBatch: does the diversity of an epoch's gradients choose a good batch size?

    python -m benchmarks.reproduce.divebatch [--parts synthetic digits] [--seeds 5] [--jobs 1] [--show]

`synthetic` is the convex problem of the first author's early code (chenyuen0103/asynchronous_sgd, src/minibatchSGD.py
and src/utils/data_generator.py, verified there; whether the paper's own, arXiv 2509.16173, is the same could not be
read): 20,000 inputs of 512 numbers uniform in [-1, 1], labels the sign of a linear function with normal weights plus
noise of standard deviation 0.01, cut 70 : 15 : 15. Every seed trains on the same data. `digits` are scikit-learn's.

Plain SGD, 50 epochs in every row. DiveBatch has delta 0.1, the setting of the early code and of CIFAR-10, and goes from
the smallest size to the largest; every step is measured whole. It is shown with the learning rate left alone and in
proportion to the batch; the early code has versions of both. AdaBatch doubles the batch every 20 epochs and multiplies
the learning rate by 0.75; constant batches keep theirs. Each row's learning rate is the best of five on the validation
part. Published: 1.06 to 5.0 times faster than SGD and AdaBatch (abstract); numbers of this experiment not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch.utils.data import TensorDataset

from adadagrad.cli.models import logistic
from benchmarks.reproduce.study import Study, cell, of_method, options, table
from benchmarks.runs import Config
from benchmarks.splits import Splits
from benchmarks.tasks import TASKS, Task

LEARNING_RATES = {"plain-sgd": (0.1, 0.316, 1.0, 3.16, 10.0)}
INPUTS, NUMBER, NOISE, EPOCHS = 512, 20_000, 0.01, 50


@lru_cache(maxsize=1)
def synthetic(folder: str) -> Splits:
    """Return the convex problem: 14,000 examples to train on, 3,000 and 3,000 held out.

    Args:
        folder: Not used: nothing is read.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = 2 * torch.rand(NUMBER, INPUTS, generator=generator) - 1
    linear = inputs @ torch.randn(INPUTS, generator=generator)
    labels = (linear + NOISE * torch.randn(NUMBER, generator=generator) > 0).long()
    ends = [NUMBER * 70 // 100, NUMBER * 85 // 100]
    return Splits(*map(TensorDataset, inputs.tensor_split(ends), labels.tensor_split(ends)))


TASK = {
    "synthetic": Task(
        name="synthetic",
        make=partial(logistic, (INPUTS,), 2),
        load=synthetic,
        budget=EPOCHS * (NUMBER * 70 // 100),
        sizes=(128, 2048),
        base_batch_size=128,
        learning_rates=LEARNING_RATES,
    ),
    "digits": replace(TASKS["digits"], learning_rates=LEARNING_RATES),
}
COLUMNS = (("accuracy", 4), ("loss", 4), ("steps", 0), ("mean_batch", 0), ("cpu_seconds", 1))


def methods(task: Task) -> dict[str, str]:
    """Return the names of a task's runs, and what the table calls them."""
    small, large, size = task.sizes[0], task.sizes[-1], task.budget // EPOCHS
    return {
        f"flat {small}": f"constant {small}",
        f"flat {large}": f"constant {large}",
        f"adabatch {size} 20": "AdaBatch",
        "divebatch-none 0.1": "DiveBatch",
        "divebatch-linear 0.1": "DiveBatch, lr with the batch",
    }


def experiment(study: Study, part: str, seeds: int) -> str:
    """Return the table of one task.

    Args:
        study: What has been, or is to be, trained.
        part: Key of `TASK`.
        seeds: How many.
    """
    task = TASK[part]
    names = methods(task)
    chosen = study.choose(task, "plain-sgd", list(names))
    results = study.results(
        Config(task, "plain-sgd", chosen[method], method, seed, "test") for seed in range(seeds) for method in chosen
    )
    rows = []
    for method, label in names.items():
        runs = of_method(results, method)
        lr = f"{chosen[method]:g}" if method in chosen else "-"
        rows.append([label, lr, *(cell(runs, key, digits) for key, digits in COLUMNS), "not at hand"])
    numbers = ["test accuracy", "test loss", "steps", "mean batch", "CPU seconds", "published"]
    return table(["batch size by", "lr", *numbers], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and print the tables.

    Args:
        arguments: The command line; None takes that of the process.
    """
    found = options(__doc__, list(TASK), 5, arguments)
    study = Study("divebatch", found.data, found.jobs, found.show)
    for part in found.parts:
        print(f"\n{part}, {EPOCHS} epochs of {TASK[part].budget // EPOCHS:,} examples", flush=True)
        print(f"\n{experiment(study, part, found.seeds)}", flush=True)


if __name__ == "__main__":
    main()
