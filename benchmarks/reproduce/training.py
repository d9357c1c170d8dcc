"""Train one row of the MNIST tables once, and keep its accuracy along the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.cli.data import load_data
from adadagrad.cli.models import cnn, logistic
from adadagrad.policies import AbstractPolicy

OPTIMIZERS = {"adagrad": torch.optim.Adagrad, "adagrad-norm": ada.AdaGradNorm}
EVALUATIONS = 30


@dataclass(frozen=True)
class Experiment:
    """What the paper trains, and how the table judges it.

    Args:
        build: Makes the model from the shape of an image and the number of classes.
        start: First batch size of the tests [examples].
        samples: Budget of the table [examples].
        target: The accuracy whose cost the table states.
    """

    build: Callable[[tuple[int, ...], int], torch.nn.Module]
    start: int
    samples: int
    target: float


EXPERIMENTS = {
    "logistic": Experiment(logistic, start=2, samples=6_000_000, target=0.90),
    "cnn": Experiment(cnn, start=8, samples=600_000, target=0.97),
}


@dataclass(frozen=True)
class Row:
    """A policy, and whether it is measured as in the paper or with the library's defaults."""

    name: str
    policy: AbstractPolicy
    paper: bool = True


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Args:
        folder: Where the IDX files are.
        model: Key of `EXPERIMENTS`.
        optimizer: Key of `OPTIMIZERS`.
        lr: Learning rate, constant.
        row: What chooses the batch size.
        samples: Budget [examples].
        seed: Seeds model and order.
        validation: How many of the last training images are kept from training and evaluated in place of the test
            images; 0 evaluates the test images.
    """

    folder: str
    model: str
    optimizer: str
    lr: float
    row: Row
    samples: int
    seed: int
    validation: int = 0


def train(run: Run) -> dict[str, Any]:
    """Train once.

    Args:
        run: What to train.

    Returns:
        The table's numbers, and under ``"curve"`` a list of (samples, steps, CPU seconds, accuracy).
    """
    torch.set_num_threads(1)
    train_set, held_out = _data(run)
    experiment = EXPERIMENTS[run.model]
    torch.manual_seed(run.seed)
    model = experiment.build((1, 28, 28), 10)
    tested = bool(run.row.policy.needs)
    engine = ada.AdaptiveBatch(
        model,
        OPTIMIZERS[run.optimizer](model.parameters(), lr=run.lr),
        train_set,
        run.row.policy,
        global_batch_size=experiment.start if tested else None,
        max_batch_size=60_000,
        micro_batch_size=1000,
        total_samples=run.samples,
        measure=ada.Measure(every=1, max_examples=None) if tested and run.row.paper else None,
        bounds=ada.Bounds.paper() if tested else None,
        seed=run.seed,
    )
    clock, curve, last = _Clock(engine), [], 0
    marks = evaluation_marks(run.samples)
    for step in engine:
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        step.update()
        clock.lap()
        last = step.plan.global_batch_size
        if engine.samples_seen >= marks[0]:
            marks = [mark for mark in marks if mark > engine.samples_seen]
            curve.append((engine.samples_seen, engine.steps, clock.seconds, accuracy(model, held_out)))
            clock.start()
    return {
        "steps": engine.steps,
        "mean_batch": engine.samples_seen / engine.steps,
        "last_batch": last,
        "samples": engine.samples_seen,
        "seconds": clock.seconds,
        "measuring": clock.measuring,
        "accuracy": curve[-1][-1],
        "curve": curve,
    }


def evaluation_marks(samples: int) -> list[int]:
    """Return the sample counts after which accuracy is taken: evenly spaced, and halves of the first.

    Args:
        samples: Budget, at least 1.

    Returns:
        Ascending, the last one `samples`.

    Example:
        >>> evaluation_marks(6_000_000)[:10]
        [1562, 3125, 6250, 12500, 25000, 50000, 100000, 200000, 400000, 600000]
    """
    even = {samples * part // EVALUATIONS for part in range(1, EVALUATIONS + 1)}
    early = {(samples // EVALUATIONS) >> halvings for halvings in range(1, 8)}
    return sorted((even | early) - {0})


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: TensorDataset) -> float:
    """Return the share of images classified rightly, 1000 at a time.

    Args:
        model: The trained model.
        data: Images and labels.

    Returns:
        Between 0 and 1.
    """
    images, labels = data.tensors
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return right / len(labels)


def _data(run: Run) -> tuple[TensorDataset, TensorDataset]:
    """Return what to train on and what to evaluate on."""
    data = load_data(f"mnist:{run.folder}")
    if not run.validation:
        return data.train, data.held_out  # type: ignore[return-value]
    images, labels = data.train.tensors  # type: ignore[attr-defined]
    kept = len(labels) - run.validation
    return TensorDataset(images[:kept], labels[:kept]), TensorDataset(images[kept:], labels[kept:])


class _Clock:
    """Processor seconds of the steps, and how many of them only measuring takes.

    Measuring is timed by the wall clock, so its share of a step is taken of that step's processor time: a step in which
    the process was stopped for a while spoils no other.
    """

    def __init__(self, engine: ada.AdaptiveBatch) -> None:
        self.seconds = self.measuring = 0.0
        self._instrument = engine.measuring.instrument
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self._wall, self._processor = time.perf_counter(), time.process_time()
        self._measured = self._instrument.seconds

    def lap(self) -> None:
        """End a step and begin the next."""
        wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
        self.seconds += processor
        self.measuring += processor * (self._instrument.seconds - self._measured) / wall
        self.start()
