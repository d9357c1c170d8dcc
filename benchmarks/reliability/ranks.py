"""Test 20: what ranks measure together, beside what is exactly true, and beside each other.

The examples are Gaussian gradients: the loss <w, x> has the gradient x, whose covariance is known, for any w. So two
thousand steps of training at rate 0 are as many trials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.parallel import SingleProcess
from benchmarks.reliability.figure import Figure
from tests.engine.cases import make_engine, train
from tests.ranks import on_ranks

BATCH, DIMENSIONS = 16, 50
LIMIT = 3_600
"""Seconds that all trials may take, on a machine with fewer cores than ranks."""

ESTIMATORS = {"Worker": ada.Worker(), "MicroBatch": ada.MicroBatch(), "PerExample": ada.PerExample()}


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of test 20.

    Args:
        reduced: 200 trials on 2 ranks in the place of 2,000 on 4.

    Yields:
        One figure after the other.
    """
    trials, ranks = (200, 2) if reduced else (2_000, 4)
    found, replicas = on_ranks(ranks, measured, ranks, trials, timeout=LIMIT)[0]
    truth = float(trace_of_covariance())
    for name, values in found.items():
        bias, error = mean(values) / truth - 1, stdev(values) / math.sqrt(len(values)) / truth
        label = f"bias of {name} over {len(values)} trials, in standard errors of {100 * error:.2f} %"
        yield Figure(test=20, name=label, value=abs(bias) / error, bar=3)
        if not reduced:
            yield Figure(test=20, name=f"bias of {name}, in %", value=100 * abs(bias), bar=1)
    for name in ("Worker", "MicroBatch"):
        apart = [a - b for a, b in zip(found[name], found["PerExample"], strict=True)]
        error = stdev(apart) / math.sqrt(len(apart))
        label = f"{name} minus PerExample on the same steps, in standard errors of their difference"
        yield Figure(test=20, name=label, value=abs(mean(apart)) / error, bar=3)
    yield from equal(ranks, replicas)


def trace_of_covariance() -> torch.Tensor:
    """Return tr Sigma of the examples: coordinate j has the variance (1 + j / d)^2."""
    return (1 + torch.arange(DIMENSIONS) / DIMENSIONS).double().square().sum()


def examples(n: int) -> TensorDataset:
    """Return n examples, of mean 0.1 in every coordinate."""
    noise = torch.randn(n, DIMENSIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return TensorDataset(0.1 + noise * (1 + torch.arange(DIMENSIONS) / DIMENSIONS))


class Linear(nn.Module):
    """The loss of each example, <w, x>."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIMENSIONS, 1, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the losses, (n, 1)."""
        loss: torch.Tensor = self.inner(x)
        return loss


def measured(rank: int, ranks: int, trials: int) -> tuple[dict[str, list[float]], list[float]]:
    """Return V of every step by every estimator, all on the same steps; and by `Worker` with one example a rank."""
    data, found = examples(trials * BATCH), {}
    for name, estimator in ESTIMATORS.items():
        found[name] = _trace(DistributedDataParallel(Linear()), estimator, data, BATCH, 2)
    one_each = _trace(DistributedDataParallel(Linear()), ada.Worker(), examples(20 * ranks), ranks, 1)
    return found, one_each


def _trace(
    model: nn.Module, estimator: Any, data: TensorDataset, batch: int, micro_batch_size: int, **options: Any
) -> list[float]:
    torch.manual_seed(0)
    engine = make_engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        data,
        ada.NormTest(eta=1.0),
        global_batch_size=batch,
        min_batch_size=batch,
        max_batch_size=batch,
        micro_batch_size=micro_batch_size,
        measure=ada.Measure(estimator=estimator, every=1, max_examples=None),
        bounds=ada.Bounds(monotone=False),
        epochs=1,
        **options,
    )
    decisions = train(engine, lambda batch: engine.model(batch[0]).mean())
    return [d.observation.gradient.variance_trace for d in decisions]


def equal(ranks: int, replicas: list[float]) -> Iterator[Figure]:
    """Yield how far estimators are apart where algebra says that they are the same: units of one example each.

    Args:
        ranks: How many ranks there were.
        replicas: V by `Worker` where each rank has one example of a step.

    Yields:
        Two figures of test 20.
    """
    plain, split = Linear(), Linear()
    data = examples(20 * 4)
    units = _trace(split, ada.MicroBatch(units=4), data, 4, 1, parallel=SingleProcess(split))
    for name, values, batch in (
        ("micro-batches of one example", units, 4),
        ("replicas of one example each", replicas, ranks),
    ):
        data = examples(20 * batch)
        alone = _trace(plain, ada.PerExample(), data, batch, batch, parallel=SingleProcess(plain))
        apart = max(abs(a / b - 1) for a, b in zip(values, alone, strict=True))
        yield Figure(test=20, name=f"PerExample beside {name}, relative", value=apart, bar=1e-5)
