"""Five training tasks of different kinds, on which methods are compared at an equal budget of samples.

| task | data | model | budget | base batch |
|---|---|---|---|---|
| digits | scikit-learn's digits | perceptron 64-64-10 | 50 epochs | 16 |
| logistic | MNIST | logistic regression | 10 epochs | 64 |
| cnn | MNIST | the paper's convolutional network | 1 epoch | 16 |
| resnet | MNIST | residual network with GroupNorm | 1 epoch | 16 |
| gpt | tiny Shakespeare | GPT of two blocks | 10,000 sequences of 64 characters | 8 |

The learning rates of each optimizer are three, a factor sqrt(10) apart, around the best of a short pilot: one seed, the
validation part, the base batch, a cosine to 0, and all of the budget for digits, a tenth for logistic and gpt, 3 to 5 %
for cnn and resnet. Those of sgd and adamw for resnet are a guess. A pilot that short is rough: where an end of three
wins in a whole run, move the exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from adadagrad.cli.models import cnn, logistic, mlp
from benchmarks.models import GPT, small_residual
from benchmarks.splits import LENGTH, Splits, digits, mnist, shakespeare

IMAGE = (1, 28, 28)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adagrad": torch.optim.Adagrad,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.01),
}
"""Each takes parameters and `lr`."""


def around(exponent: float) -> tuple[float, float, float]:
    """Return three learning rates a factor sqrt(10) apart, to three digits.

    Args:
        exponent: Of the one in the middle: -1.5 means 0.0316.
    """
    low, middle, high = (float(f"{10 ** (exponent + change):.3g}") for change in (-0.5, 0, 0.5))
    return low, middle, high


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, on what, and for how long.

    Args:
        name: Key of `TASKS`.
        make: Makes the model, with the random numbers of the moment.
        load: Reads the data from below a folder.
        budget: Examples to train on in total.
        sizes: Constant batch sizes to compare with, in examples, from small to large.
        base_batch_size: Where adaptive methods begin, and what the learning rates were chosen at.
        learning_rates: Three or more for each optimizer, from small to large; those of `TASKS` have three for each of
            `OPTIMIZERS`.
        metric: What counts: ``"accuracy"``, or ``"loss"`` in nats per target.
        micro_batch_size: Most examples in one forward.
    """

    name: str
    make: Callable[[], nn.Module]
    load: Callable[[str], Splits]
    budget: int
    sizes: tuple[int, ...]
    base_batch_size: int
    learning_rates: Mapping[str, tuple[float, ...]] = field(hash=False)
    metric: str = "accuracy"
    micro_batch_size: int = 512

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger metric is a better one."""
        return self.metric == "accuracy"

    def score(self, metric: float | None) -> float:
        """Return the metric with a sign that makes more better; minus infinity for a run that diverged.

        Args:
            metric: Of a run, None where it diverged.
        """
        if metric is None:
            return -math.inf
        return metric if self.higher_is_better else -metric

    def build(self, seed: int) -> nn.Module:
        """Return a new model, the same for the same seed.

        Args:
            seed: Seeds torch, from here on.
        """
        torch.manual_seed(seed)
        return self.make()

    def data(self, folder: str) -> Splits:
        """Return the three parts of the data; kept from one call to the next.

        Args:
            folder: Where ``mnist/`` and ``tinyshakespeare/`` lie.
        """
        return self.load(folder)

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """Return the mean cross-entropy of a batch, in nats per target.

        Args:
            model: The model.
            batch: Inputs, and targets: one an example, or one a character.
        """
        return F.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: TensorDataset) -> dict[str, float]:
        """Return mean loss and accuracy over all targets.

        Args:
            model: The model; it is left in the mode it was in.
            data: Not empty.

        Returns:
            ``loss`` in nats per target and ``accuracy`` between 0 and 1; not finite where the model is not.
        """
        training = model.training
        model.eval()
        loss, right, count = 0.0, 0, 0
        for x, y in zip(*(tensor.split(self.micro_batch_size) for tensor in data.tensors), strict=True):
            logits = model(x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            right += int((logits.argmax(1) == y).sum())
            count += y.numel()
        model.train(training)
        return {"loss": loss / count, "accuracy": right / count}


def _task(name: str, exponents: tuple[float, float, float], **settings: Any) -> Task:
    """Return a task whose middle learning rates have these exponents, in the order of `OPTIMIZERS`."""
    rates = {key: around(exponent) for key, exponent in zip(OPTIMIZERS, exponents, strict=True)}
    return Task(name=name, learning_rates=rates, **settings)


TASKS = {
    task.name: task
    for task in (
        _task(
            "digits",
            (-1, -1, -2.5),
            make=partial(mlp, (1, 8, 8), 10),
            load=digits,
            budget=50 * 1078,
            sizes=(16, 64, 256),
            base_batch_size=16,
        ),
        _task(
            "logistic",
            (-1, -1, -2),
            make=partial(logistic, IMAGE, 10),
            load=mnist,
            budget=550_000,
            sizes=(64, 256, 1024),
            base_batch_size=64,
        ),
        _task(
            "cnn",
            (-2, -1.5, -2.5),
            make=partial(cnn, IMAGE, 10),
            load=mnist,
            budget=55_000,
            sizes=(16, 64, 256),
            base_batch_size=16,
        ),
        _task(
            "resnet",
            (-1.5, -1, -2),
            make=small_residual,
            load=mnist,
            budget=55_000,
            sizes=(16, 64, 256),
            base_batch_size=16,
        ),
        _task(
            "gpt",
            (-1.5, -1, -2),
            make=partial(GPT, length=LENGTH, width=64, heads=4, blocks=2),
            load=shakespeare,
            budget=10_000,
            sizes=(8, 32, 128),
            base_batch_size=8,
            metric="loss",
            micro_batch_size=64,
        ),
    )
}
"""The tasks by name."""
