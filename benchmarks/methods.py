"""What chooses the batch size of a run in `benchmarks.runs`, by name.

A method's name is a word and numbers, ``"constant 64"`` or ``"noise-gain 0.5"``, so that it can be written in a file's
name and sent to another process. A new one is a function here and a row in `METHODS`: processes that train import this
file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, UnknownName
from benchmarks.tasks import OPTIMIZERS, Task

MEMORY = {"sgd": 0.0, "adagrad": 1.0, "adamw": 0.999}
"""How each optimizer's accumulator of squared gradients forgets; SGD has none."""


def constant(task: Task, optimizer: str, size: float) -> dict[str, Any]:
    """Return the settings of a batch size that stays."""
    return {"policy": ada.ConstantBatch(int(size))}


def norm(task: Task, optimizer: str, eta: float) -> dict[str, Any]:
    """Return the settings of the norm test with the library's defaults, from the task's base batch."""
    return {"policy": ada.NormTest(eta=eta), "global_batch_size": task.base_batch_size}


def paper(task: Task, optimizer: str, eta: float) -> dict[str, Any]:
    """Return the settings of the norm test as in the paper: every step measured whole, growth without limit."""
    measure = ada.Measure(every=1, max_examples=None)
    return {**norm(task, optimizer, eta), "measure": measure, "bounds": ada.Bounds.paper()}


def recommended(task: Task, optimizer: str) -> dict[str, Any]:
    """Return what the library recommends for the optimizer, from the task's base batch."""
    example = OPTIMIZERS[optimizer]([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return ada.recommended(example, global_batch_size=task.base_batch_size)


def noise(
    rule: str,
    task: Task,
    optimizer: str,
    fraction: float,
    growth: float = 1.1,
    decay: float = 0.95,
    overhead: float = 0.2,
) -> dict[str, Any]:
    """Return the settings of a batch at a fraction of the noise scale, with one of `RULES` for the learning rate."""
    return {
        "policy": ada.GradientNoiseScale(fraction=fraction, averaging=decay),
        "rate": RULES[rule](optimizer, decay),
        "global_batch_size": task.base_batch_size,
        "min_batch_size": task.base_batch_size,
        "bounds": ada.Bounds(max_growth=growth),
        "measure": ada.Measure(max_overhead=overhead),
    }


RULES: dict[str, Callable[[str, float], Any]] = {
    "none": lambda optimizer, decay: None,
    "sqrt": lambda optimizer, decay: ada.SquareRootScaling(),
    "linear": lambda optimizer, decay: ada.LinearScaling(),
    "gain": lambda optimizer, decay: ada.AdaScale(smoothing=decay, progress_in="samples"),
    "root-gain": lambda optimizer, decay: ada.AdamScale(smoothing=decay, progress_in="samples"),
    "accumulator": lambda optimizer, decay: ada.AccumulatorScale(
        MEMORY[optimizer], smoothing=decay, progress_in="samples"
    ),
}
"""Learning-rate rules, read in samples so that all runs end at the same number of them."""

WARM_UP = 0.055
"""Share of the budget in which linear and square-root scaling reach their learning rate, as in AdaScale's paper."""
SCALINGS: dict[str, Callable[..., Any]] = {
    "gain": ada.AdaScale,
    "root-gain": ada.AdamScale,
    "accumulator": ada.AccumulatorScale,
    "linear": ada.LinearScaling,
    "sqrt": ada.SquareRootScaling,
}
"""Learning-rate rules of a batch that is given; the first three count scale-invariant progress, the budget included."""


def scaling(rule: str, task: Task, optimizer: str) -> dict[str, Any]:
    """Return the settings of one of `SCALINGS` from the task's base batch, its gain measured in every step."""
    memory = {"memory": MEMORY[optimizer]} if rule == "accumulator" else {}
    rate = SCALINGS[rule](base_batch_size=task.base_batch_size, **memory)
    return {"rate": rate, "measure": ada.Measure(every=1)} if rate.needs else {"rate": rate}


def scaled(rule: str, task: Task, optimizer: str, scale: float) -> dict[str, Any]:
    """Return the settings of a constant batch of so many base batches; rules without a gain get a warm-up."""
    settings = scaling(rule, task, optimizer)
    if "measure" not in settings:
        settings["lr_schedule"] = ada.CosineSchedule(warmup_samples=WARM_UP * task.budget)
    return {"policy": ada.ConstantBatch(int(scale * task.base_batch_size)), **settings}


def elastic(
    rule: str, task: Task, optimizer: str, middle: float, last: float, first_samples: float, second_samples: float
) -> dict[str, Any]:
    """Return the settings of one base batch, then `middle` of them, then `last`, switched at these samples."""
    base = task.base_batch_size
    stages = {0: base, int(first_samples): int(middle * base), int(second_samples): int(last * base)}
    return {"policy": ada.StagedBatch(stages), **scaling(rule, task, optimizer)}


def staged(task: Task, optimizer: str) -> dict[str, Any]:
    """Return the settings of the task's first three sizes, switched at 1/4 and 1/2 of the budget, lr by its root."""
    small, middle, large = task.sizes[:3]
    stages = {0: small, task.budget // 4: middle, task.budget // 2: large}
    return {"policy": ada.StagedBatch(stages), "rate": ada.SquareRootScaling()}


def flat(task: Task, optimizer: str, size: float) -> dict[str, Any]:
    """Return the settings of a batch size and a learning rate that stay."""
    return {**constant(task, optimizer, size), "lr_schedule": ada.ConstantSchedule()}


def cabs(task: Task, optimizer: str, least: float, most: float) -> dict[str, Any]:
    """Return the settings of CABS between two sizes, every step measured whole, at a learning rate that stays."""
    return {
        "policy": ada.CABS(),
        "global_batch_size": int(least),
        "min_batch_size": int(least),
        "max_batch_size": int(most),
        "measure": ada.Measure(every=1, max_examples=None),
        "lr_schedule": ada.ConstantSchedule(),
    }


def divebatch(rule: str, task: Task, optimizer: str, delta: float) -> dict[str, Any]:
    """Return the settings of DiveBatch from the smallest to the largest of the task's sizes, with one of `RULES`."""
    return {
        "policy": ada.DiveBatch(delta=delta),
        "rate": RULES[rule](optimizer, 0.0),
        "global_batch_size": task.sizes[0],
        "max_batch_size": task.sizes[-1],
        "measure": ada.Measure(every=1, max_examples=None),
        "lr_schedule": ada.ConstantSchedule(),
    }


def adabatch(task: Task, optimizer: str, dataset_size: float, every_epochs: float) -> dict[str, Any]:
    """Return the settings of AdaBatch between the task's sizes: twice the batch, 0.75 of the learning rate."""
    size, every = int(dataset_size), int(every_epochs)
    policy = ada.GeometricBatch.adabatch(task.sizes[0], size, every_epochs=every, end=task.sizes[-1])
    decays = ada.StepSchedule(range(every * size, task.budget, every * size), gamma=0.75)
    return {"policy": policy, "lr_schedule": decays}


METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "constant": constant,
    "norm": norm,
    "paper": paper,
    "recommended": recommended,
    **{f"noise-{rule}": partial(noise, rule) for rule in RULES},
    **{f"scaled-{rule}": partial(scaled, rule) for rule in SCALINGS},
    **{f"elastic-{rule}": partial(elastic, rule) for rule in SCALINGS},
    "staged": staged,
    "flat": flat,
    "cabs": cabs,
    **{f"divebatch-{rule}": partial(divebatch, rule) for rule in ("none", "linear")},
    "adabatch": adabatch,
}
"""Each takes task, optimizer's name and the numbers of a method's name, and returns arguments of `AdaptiveBatch`."""


def arguments(method: str, task: Task, optimizer: str) -> dict[str, Any]:
    """Return the arguments of `AdaptiveBatch` that make a method.

    Args:
        method: A word of `METHODS` and its numbers.
        task: What is trained.
        optimizer: Key of `benchmarks.tasks.OPTIMIZERS`.

    Raises:
        UnknownName: The word is not in `METHODS`.
        InvalidArgument: What follows it are no numbers.
    """
    name, *words = method.split()
    if name not in METHODS:
        raise UnknownName("method", name, METHODS)
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise InvalidArgument(f'method must be a word and numbers, as in "norm 0.5", got {method!r}') from error
    return METHODS[name](task, optimizer, *numbers)
