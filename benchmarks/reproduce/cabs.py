"""The small MNIST experiment of CABS: does a batch tied to learning rate and loss beat one that stays?

    python -m benchmarks.reproduce.cabs --data DIR [--parts cnn mlp logistic] [--seeds 3] [--jobs 1] [--show]

Settings of the example script of ProbabilisticNumerics/cabs (verified there): plain SGD at a constant learning rate of
0.1, sizes from 16 to 2048, first 16, averages 0.95. That script trains a network of two convolutions and two dense
layers (3.3 million parameters; verified in the fork chenyuen0103/cabs at e0ee742) for 8,000 steps; here it is the
AdAdaGrad paper's network of two convolutions and one dense layer on twice the 55,000 images, and a perceptron of 64
hidden units and logistic regression on ten times as many: the same number of samples in every row. On logistic
regression CABS asks for fewer than the smallest size, so that its row is constant 16. Every step of CABS is measured on
all its examples. Nothing is tuned. Test accuracy after the last step, training loss on 2,000 images. Published numbers:
not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from adadagrad.cli.models import mlp
from benchmarks.reproduce.study import Study, cell, of_method, options, table
from benchmarks.runs import Config
from benchmarks.tasks import IMAGE, TASKS

LR = 0.1
METHODS = {
    "cabs 16 2048": "CABS, 16 to 2048",
    "flat 16": "constant 16",
    "flat 64": "constant 64",
    "flat 256": "constant 256",
    "flat 1024": "constant 1024",
}
"""Names of runs, and what the table calls them."""
TASK = {
    "cnn": replace(TASKS["cnn"], budget=110_000),
    "mlp": replace(TASKS["logistic"], name="mlp", make=partial(mlp, IMAGE, 10)),
    "logistic": TASKS["logistic"],
}
COLUMNS = (("steps", 0), ("mean_batch", 0), ("accuracy", 4), ("train_loss", 4), ("cpu_seconds", 1))


def experiment(study: Study, part: str, seeds: int) -> str:
    """Return the table of one model.

    Args:
        study: What has been, or is to be, trained.
        part: Key of `TASK`.
        seeds: How many.
    """
    results = study.results(
        Config(TASK[part], "plain-sgd", LR, method, seed, "test") for seed in range(seeds) for method in METHODS
    )
    rows = [
        [label, *(cell(of_method(results, method), key, digits) for key, digits in COLUMNS), "not at hand"]
        for method, label in METHODS.items()
    ]
    names = ["steps", "mean batch", "test accuracy", "training loss", "CPU seconds", "published"]
    return table(["batch size by", *names], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and print the tables.

    Args:
        arguments: The command line; None takes that of the process.
    """
    found = options(__doc__, list(TASK), 3, arguments)
    study = Study("cabs", found.data, found.jobs, found.show)
    for part in found.parts:
        print(f"\n{part}, lr {LR:g}, {TASK[part].budget:,} samples", flush=True)
        print(f"\n{experiment(study, part, found.seeds)}", flush=True)


if __name__ == "__main__":
    main()
