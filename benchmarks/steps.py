"""Steps of training that are timed, plain ones and measured ones, and the rotation that times them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.statistics.base import AbstractEstimator, AbstractInstrument, Request
from benchmarks.models import Workload

Run = Callable[[], object]


def step_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    instrument: AbstractInstrument | None = None,
    part: int = 0,
) -> Run:
    """Return a step of training.

    Args:
        model: The model.
        optimizer: Its optimizer.
        x: Inputs (n, ...).
        y: Targets (n, ...).
        instrument: What measures, None for a plain step.
        part: How many examples, from the first on, it measures.
    """
    n = len(x)

    def plain_step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    def measured_step() -> None:
        assert instrument is not None
        with instrument.micro_batch(part, 1 / n):
            (F.cross_entropy(model(x[:part]), y[:part]) * (part / n)).backward()
        if part < n:
            instrument.close_group()
            (F.cross_entropy(model(x[part:]), y[part:]) * (1 - part / n)).backward()
        instrument.finish(n)
        optimizer.step()
        optimizer.zero_grad()

    return plain_step if instrument is None else measured_step


def plain(work: Workload, x: Tensor, y: Tensor) -> Run:
    """Return a plain step on a model of its own."""
    return step_of(*work.fresh(), x, y)


def measured(
    work: Workload,
    x: Tensor,
    y: Tensor,
    request: Request,
    part: int,
    estimator: AbstractEstimator | None = None,
) -> Run:
    """Return a step that measures its first `part` examples, by `PerExample` if nothing else, on a model of its own."""
    model, optimizer = work.fresh()
    instrument = (ada.PerExample() if estimator is None else estimator).open(model, request)
    return step_of(model, optimizer, x, y, instrument, part)


def interleaved(runs: dict[str, Run], rounds: int, steps: int) -> dict[str, list[float]]:
    """Time all runs in turn, each round in another order.

    Args:
        runs: What to time, by name.
        rounds: How often.
        steps: Calls that are timed together.

    Returns:
        Seconds per call, one number a round.
    """
    names = list(runs)
    for name in names:  # the first measured steps verify and make trial runs; so do steps 5 and 9, rarely met later
        for _ in range(9):
            runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = _now()
            for _ in range(steps):
                runs[name]()
            times[name].append((_now() - started) / steps)
    return times


def _now() -> float:
    """Return the clock once an accelerator, if there is one in use, has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
