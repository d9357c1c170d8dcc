"""What chooses the batch size of a run in `benchmarks.runs`, by name.

A method's name is a word and numbers, ``"constant 64"`` or ``"norm 0.5"``, so that it can be written in a file's name
and sent to another process. A new one is a function here and a row in `METHODS`: processes that train import this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, UnknownName
from benchmarks.tasks import Task


def constant(task: Task, optimizer: str, size: float) -> dict[str, Any]:
    """Return the settings of a batch size that stays."""
    return {"policy": ada.ConstantBatch(int(size))}


def norm(task: Task, optimizer: str, eta: float) -> dict[str, Any]:
    """Return the settings of the norm test with the library's defaults, from the task's base batch."""
    return {"policy": ada.NormTest(eta=eta), "global_batch_size": task.base_batch_size}


METHODS: dict[str, Callable[..., dict[str, Any]]] = {"constant": constant, "norm": norm}
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
