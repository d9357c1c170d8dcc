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

METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "constant": constant,
    "norm": norm,
    "paper": paper,
    "recommended": recommended,
    **{f"noise-{rule}": partial(noise, rule) for rule in RULES},
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
