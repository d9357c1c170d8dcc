"""Tests 4, 15, 21, 22: a decision is the same on all ranks, defined, in bounds; the rate is a matter of samples."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.core.errors import AdadagradError
from adadagrad.policies import next_batch_size
from benchmarks.reliability.figure import Figure
from tests.engine.cases import Recording, Sizes, make_data, make_engine, make_model, train
from tests.policies.cases import CASES
from tests.ranks import on_ranks

EVERY_STEP = ada.Measure(every=1, max_examples=None)
TESTS: tuple[Any, ...] = (
    ada.NormTest(eta=0.5),
    ada.InnerProductTest(theta=0.5),
    ada.AugmentedInnerProductTest(theta=0.5, nu=2.0),
    ada.CoordinateNormTest(eta=0.5),
    ada.GradientNoiseScale(averaging=None),
    ada.CABS(averaging=None),
    ada.DiveBatch(),
    ada.BigBatch(increment=4),
)


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of tests 4, 15, 21 and 22.

    Args:
        reduced: 300 steps and two ranks in place of 10,000 on two and on four, and fewer random statistics.

    Yields:
        One figure after the other.
    """
    steps = 300 if reduced else 10_000
    for ranks in (2,) if reduced else (2, 4):
        first, *others = on_ranks(ranks, of_rank, steps)
        apart = sum(a != b for other in others for a, b in zip(first, other, strict=True))
        on = f"in {steps} steps on {ranks} ranks"
        yield Figure(test=4, name=f"decisions that differ {on}", value=apart, comparison="==", bar=0)
        sizes = {size for size, _, _ in first}
        yield Figure(test=4, name=f"different batch sizes {on}", value=len(sizes), comparison=">=", bar=10)
    for name, edge in EDGES.items():
        wrong = sum(undefined(policy, edge) for policy in TESTS)
        yield Figure(test=15, name=f"undefined decisions, {name}", value=wrong, comparison="==", bar=0)
    draws = 2_000 if reduced else 200_000
    yield Figure(
        test=21, name=f"broken bounds in {draws} random requests", value=unbounded(draws), comparison="==", bar=0
    )
    asked = sometimes(3)
    yield Figure(test=21, name="changes outside measured steps, one in 3", value=asked, comparison="==", bar=0)
    yield Figure(test=22, name="lr apart at the same samples, 4 traces", value=rates_apart(), comparison="==", bar=0.0)


def of_rank(rank: int, steps: int) -> list[tuple[int, float | None, float | None]]:
    """Return size, request and loss of every step of a run whose batch follows its noise up and down."""
    model = make_model()
    engine = make_engine(
        DistributedDataParallel(model),
        torch.optim.SGD(model.parameters(), lr=0.05),
        policy=ada.GradientNoiseScale(averaging=None),
        measure=EVERY_STEP,
        global_batch_size=8,
        min_batch_size=4,
        max_batch_size=40,
        total_samples=50 * steps,
    )
    return [(d.plan.global_batch_size, d.requested, d.observation.loss) for d in train(engine, steps=steps)]


def _flat(model: nn.Module) -> Callable[[Any], Any]:
    return lambda batch: model(batch[0]).sum() * 0.0


def _same(model: nn.Module) -> Callable[[Any], Any]:
    return lambda batch: (model(torch.ones_like(batch[0])) - 1).square().mean()


def _plain(model: nn.Module) -> Callable[[Any], Any]:
    return lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])


def _tiny(model: nn.Module) -> Callable[[Any], Any]:
    return lambda batch: 1e-200 * nn.functional.cross_entropy(model(batch[0]), batch[1])


EDGES: dict[str, dict[str, Any]] = {
    "zero gradient": {"loss": _flat},
    "tiny gradient": {"loss": _tiny},
    "zero variance": {"loss": _same},
    "one micro-batch": {"micro_batch_size": 256},
    "units of two micro-batches": {"measure": ada.Measure(estimator=ada.MicroBatch(), every=1), "start": 8},
    "batch = data set": {"start": 30},
    "two examples": {"n": 2, "start": 2},
    "one example": {"n": 1, "start": 1},
    "no example": {"n": 0},
}
"""What a step may look like at its worst, by name."""


def undefined(policy: Any, edge: dict[str, Any]) -> int:
    """Return how many decisions of a short run were neither a size in bounds nor an error on purpose."""
    options = {"start": 4, "n": 30, "loss": _plain, "measure": EVERY_STEP, "micro_batch_size": 7, **edge}
    n, loss = options.pop("n"), options.pop("loss")
    data = TensorDataset(*(tensor[:n] for tensor in make_data().tensors))
    model = make_model()
    try:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        engine = make_engine(
            model, optimizer, data, policy, global_batch_size=options.pop("start"), total_samples=90, **options
        )
        sizes = [d.next_plan.global_batch_size for d in train(engine, loss(engine.model))]
    except AdadagradError:
        return 0  # it says what to do instead
    except Exception:
        return 1
    return sum(not 1 <= size <= n for size in sizes)


def unbounded(draws: int) -> int:
    """Return how many random requests led to a size outside the bounds, or to a change that they rule out."""
    draw = random.Random(0)
    broken = 0
    for _ in range(draws):
        multiple = draw.choice([1, 1, 2, 8, 48])
        minimum, span = draw.randint(1, 50), draw.randint(2, 40)
        low, high = -(-minimum // multiple) * multiple, multiple * (-(-minimum // multiple) + span)
        current = draw.randrange(low, high + 1, multiple)
        bounds = ada.Bounds(
            multiple_of=multiple,
            max_growth=draw.choice([None, 1.1, 2.0]),
            monotone=draw.choice([None, True, False]),
            on_infinite=draw.choice(["hold", "cap"]),
        )
        special = [0.0, -1.0, math.nan, math.inf, -math.inf, float(current)]
        requested = draw.choice([*special, *(10 ** draw.uniform(-3, 6) for _ in special)])
        policy = draw.choice(CASES).policy
        size, _ = next_batch_size(
            requested, current=current, bounds=bounds, monotone=policy.monotone, minimum=minimum, maximum=high
        )
        monotone = policy.monotone if bounds.monotone is None else bounds.monotone
        limit = math.inf if bounds.max_growth is None else current * bounds.max_growth + multiple
        kept = low <= size <= high and size % multiple == 0 and size <= max(limit, low)
        kept &= not (monotone and size < current) and not (math.isnan(requested) and size != current)
        broken += not kept
    return broken


def sometimes(every: int) -> int:
    """Return how many steps changed the batch though only one in `every` was to be measured."""
    model = make_model()
    engine = make_engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        policy=ada.GradientNoiseScale(averaging=None),
        measure=ada.Measure(every=every, max_examples=None),
        global_batch_size=8,
        max_batch_size=40,
        total_samples=3_000,
    )
    decisions = train(engine)
    changed = [d.step for d in decisions if d.next_plan != d.plan]
    assert len(changed) > 5
    return sum((step - 1) % every != 0 for step in changed)


def rates_apart() -> float:
    """Return how far learning rates of four batch-size traces ever lay apart at the same number of samples."""
    apart = 0.0
    for schedule in (ada.CosineSchedule(warmup_samples=100), ada.LinearSchedule(), ada.StepSchedule({200: 0.5})):
        expected = _rates(schedule, ada.StagedBatch({0: 1}))
        for policy in (Sizes(seed=1), Sizes(seed=2, largest=9), ada.StagedBatch("0:7 100:64"), ada.NormTest(eta=0.6)):
            apart = max(apart, *(abs(lr - expected[seen]) for seen, lr in _rates(schedule, policy).items()))
    return apart


def _rates(schedule: Any, policy: Any) -> dict[int, float]:
    optimizer = Recording((model := make_model()).parameters(), lr=0.3)
    decisions = train(make_engine(model, optimizer, make_data(), policy, lr_schedule=schedule, total_samples=600))
    before = [d.samples_seen - (d.observation.global_batch_size or 0) for d in decisions]
    return dict(zip(before, optimizer.rates, strict=True))
