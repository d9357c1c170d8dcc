"""Test 23: what the engine and its measurements cost, in time beside a hand-written loop, and in bytes between ranks.

Times are ratios of medians of interleaved runs in one process, or in one process group; "control" is the hand-written
loop a second time, and says how far a ratio may be trusted. They need a core for every rank: on fewer, what is timed is
how the ranks take turns. The reduced form counts bytes alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.cli.models import cnn
from benchmarks.reliability.figure import Figure
from tests.engine.cases import make_engine, make_model, mean_loss, train
from tests.ranks import on_ranks

ROUNDS = 12
"""Runs of each kind."""


@dataclass(frozen=True)
class Task:
    """A model, its inputs, the examples of a step on one rank, steps of a run, and the bar of the ratio."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    steps: int
    bar: float


TASKS = {
    "cnn, 256 a rank": Task(lambda: cnn((1, 28, 28), 10), (1, 28, 28), 256, 6, 1.03),
    "mlp of 1 M parameters, 64 a rank": Task(
        lambda: nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 700), nn.ReLU(), nn.Linear(700, 10)),
        (256,),
        64,
        40,
        1.10,
    ),
}

EVERYTHING = ada.Measure(every=1, max_examples=None)
TESTS: dict[str, tuple[Any, ada.Measure]] = {
    "norm test": (ada.NormTest(eta=100.0), EVERYTHING),
    "norm test on a part of the step": (ada.NormTest(eta=100.0), ada.Measure(every=1, max_examples=8)),
    "norm test on micro-batches": (ada.NormTest(eta=100.0), ada.Measure(estimator=ada.MicroBatch(), every=1)),
    "norm test on workers": (ada.NormTest(eta=100.0), ada.Measure(estimator=ada.Worker(), every=1)),
    "inner product test": (ada.InnerProductTest(theta=100.0), EVERYTHING),
    "inner product test on a part of the step": (
        ada.InnerProductTest(theta=100.0),
        ada.Measure(every=1, max_examples=8),
    ),
    "inner product test on micro-batches": (
        ada.InnerProductTest(theta=100.0),
        ada.Measure(estimator=ada.MicroBatch(), every=1),
    ),
    "augmented inner product test": (ada.AugmentedInnerProductTest(theta=100.0, nu=100.0), EVERYTHING),
}
"""Tests that no batch fails, so that its size stays, and what they are measured with."""

SHARDED = ("norm test", "norm test on a part of the step", "norm test on micro-batches", "norm test on workers")
"""Those that a sharded model is measured with here."""


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of test 23.

    Args:
        reduced: Bytes alone.

    Yields:
        One figure after the other.
    """
    counted = on_ranks(2, bytes_of_rank)[0]
    sharded = on_ranks(2, bytes_of_rank, True)[0]
    yield Figure(
        test=23,
        name="bytes a rank sends for a step of two micro-batches that is not measured",
        value=counted[None],
        bar=72,
    )
    for name in TESTS:
        yield Figure(test=23, name=f"bytes more for the {name}", value=counted[name] - counted[None], bar=64)
    for name in SHARDED:
        more = sharded[name] - sharded[None]
        bar = 160 if "micro-batches" in name else 64  # which grows with their number, here 4
        yield Figure(test=23, name=f"bytes more for the {name}, sharded", value=more, bar=bar)
    if reduced:
        return
    for name, task in TASKS.items():
        seconds = on_ranks(2, times_of_rank, name)[0]
        yield from _ratios(f"engine beside a hand-written DDP loop, 2 ranks, {name}", seconds, "engine", task.bar)
    for name in TASKS:
        seconds = times_of_statistics(name)
        for kind, bar in (("every step", 1.10), ("every 10", 1.02)):
            yield from _ratios(f"MicroBatch {kind}, {name}", seconds, kind, bar)
        value = median(seconds["per example"]) / median(seconds["hand"])
        yield Figure(test=23, name=f"PerExample every step, {name}, reported", value=value, bar=float("inf"))


def _ratios(name: str, seconds: dict[str, list[float]], kind: str, bar: float) -> Iterator[Figure]:
    base = (median(seconds["hand"]) + median(seconds["control"])) / 2
    control = median(seconds["control"]) / median(seconds["hand"])
    yield Figure(test=23, name=f"time, {name} (control {control:.3f})", value=median(seconds[kind]) / base, bar=bar)


def bytes_of_rank(rank: int, sharded: bool = False) -> dict[str | None, float]:
    """Return what one step's messages hold on this rank, by the name of the test; None for an unmeasured step."""
    found: dict[str | None, float] = {}
    for name, (policy, measure) in {None: (ada.ConstantBatch(32), None), **TESTS}.items():
        if sharded and name not in (None, *SHARDED):
            continue
        model = make_model()
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        else:
            model = DistributedDataParallel(model)
        engine = make_engine(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            policy=policy,
            measure=measure,
            micro_batch_size=16
            if name == "norm test on workers"
            else 8,  # two of them a step in each case, before the last of which ranks tell of their memory
            **({} if name is None else {"global_batch_size": 31, "max_batch_size": 32}),  # below the cap: measured
            total_samples=1_000,
        )
        train(engine, steps=4)  # the first ones make trial runs
        sent = 0
        whole = dist.all_reduce

        def counting(tensor: Tensor, *arguments: Any, whole: Any = whole, **named: Any) -> Any:
            nonlocal sent
            sent += tensor.numel() * tensor.element_size()
            return whole(tensor, *arguments, **named)

        with patch.object(dist, "all_reduce", counting):
            (decision,) = train(engine, mean_loss(model), steps=1)
        assert (decision.observation.gradient is None) == (name is None)
        found[name] = float(sent)
    return found


def _data(task: Task) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    n = 2 * task.batch * task.steps
    return TensorDataset(
        torch.randn(n, *task.shape, generator=generator), torch.randint(0, 10, (n,), generator=generator)
    )


def _fresh(task: Task, ranks: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = task.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return (DistributedDataParallel(model) if ranks > 1 else model), optimizer


def by_hand(task: Task, data: TensorDataset, rank: int = 0, ranks: int = 1) -> float:
    """Train with the tightest loop, which indexes tensors by a permutation; return its seconds."""
    model, optimizer = _fresh(task, ranks)
    inputs, labels = data.tensors
    size, total = task.batch * ranks, 0.0
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    for number in range(task.steps):
        rows = order[number * size + rank : (number + 1) * size : ranks]
        loss = F.cross_entropy(model(inputs[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return time.perf_counter() - started


def by_engine(task: Task, data: TensorDataset, ranks: int = 1, measure: ada.Measure | None = None) -> float:
    """Train with the engine on as many examples; return its seconds."""
    model, optimizer = _fresh(task, ranks)
    size = task.batch * ranks
    engine = ada.AdaptiveBatch(
        model,
        optimizer,
        data,
        ada.ConstantBatch(size),
        micro_batch_size=task.batch,
        total_samples=size * task.steps,
        measure=measure,
    )
    started = time.perf_counter()
    train(engine, mean_loss(model))
    return time.perf_counter() - started


def times_of_rank(rank: int, name: str) -> dict[str, list[float]]:
    """Time the engine and the hand-written loop in turn on this rank."""
    task = TASKS[name]
    data = _data(task)
    kinds: dict[str, Callable[[], float]] = {
        "hand": lambda: by_hand(task, data, rank, 2),
        "engine": lambda: by_engine(task, data, 2),
        "control": lambda: by_hand(task, data, rank, 2),
    }
    return _in_turn(kinds, dist.barrier)


def times_of_statistics(name: str) -> dict[str, list[float]]:
    """Time measuring by differences at every step, at every tenth, and per example, beside not measuring."""
    task = TASKS[name]
    data = _data(task)

    def run(every: int, estimator: Any) -> float:
        return by_engine(task, data, measure=ada.Measure(estimator=estimator, every=every, max_examples=None))

    kinds: dict[str, Callable[[], float]] = {
        "hand": lambda: by_engine(task, data),
        "every step": lambda: run(1, ada.MicroBatch()),
        "every 10": lambda: run(10, ada.MicroBatch()),
        "per example": lambda: run(1, ada.PerExample()),
        "control": lambda: by_engine(task, data),
    }
    return _in_turn(kinds, lambda: None)


def _in_turn(kinds: dict[str, Callable[[], float]], before: Callable[[], object]) -> dict[str, list[float]]:
    """Run every kind once to warm up, then all of them in turn, each round beginning with another one."""
    names = list(kinds)
    for kind in names:
        kinds[kind]()
    seconds: dict[str, list[float]] = {kind: [] for kind in names}
    for number in range(ROUNDS):
        turn = number % len(names)
        for kind in names[turn:] + names[:turn]:
            before()
            seconds[kind].append(kinds[kind]())
    return seconds
