"""Tests 1 to 3: the gradient is the mean over the planned examples, for every split, through every change of size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.batching.cursor import SampleOrder
from benchmarks.reliability.figure import Figure
from tests.engine.cases import Recording, Sizes, make_data, make_engine, make_model, train, weights
from tests.engine.test_gradient import direct_gradient, weighted_loss, worst_error
from tests.ranks import on_ranks

EVERYTHING = ada.Measure(every=1, max_examples=None)
MICRO = 2
"""Micro-batch size of the transitions, in examples."""


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of tests 1 to 3.

    Args:
        reduced: Fewer splits, pairs and places of the change, and two ranks alone.

    Yields:
        One figure after the other.
    """
    micro = (1, 7, 256) if reduced else (1, 2, 3, 5, 7, 16, 64, 256)
    kinds: tuple[Any, ...] = (None, "rows") if reduced else (None, "number", "scalar tensor", "rows")
    worst = max(worst_error(size, kind, measure=EVERYTHING) for size in micro for kind in kinds)
    yield Figure(
        test=1, name="relative gradient error, one process, float64, ragged, token weights", value=worst, bar=1e-12
    )
    worst = max(worst_single(size) for size in micro)
    yield Figure(test=1, name="relative gradient error, one process, float32", value=worst, bar=1e-6)
    name = "control: relative error of the mean of micro-batch means, which must be seen"
    yield Figure(test=1, name=name, value=mean_of_means(), comparison=">=", bar=0.12)
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 9) if not reduced or (a + 3 * b) % 5 == 0]
    yield Figure(
        test=2, name=f"known gradient, {len(pairs)} transitions, one process", value=transitions(pairs), bar=1e-6
    )
    places = range(MICRO, 42, MICRO) if not reduced else range(MICRO, 42, 5 * MICRO)
    expected = {key: changed_at(*key) for key in cases(places)}
    for ranks in (2,) if reduced else (2, 4):
        found = on_ranks(ranks, of_rank, list(places), pairs if ranks == 2 else pairs[:8])
        on = f"{ranks} ranks under DDP"
        worst = max(error_over_ranks(rank) for rank in found)
        yield Figure(test=1, name=f"relative gradient error, {on}, float64, token weights", value=worst, bar=1e-12)
        worst = max(rank["transitions"] for rank in found)
        yield Figure(test=2, name=f"known gradient through transitions, {on}", value=worst, bar=1e-6)
        apart = max(_distance(w, rank["changes"][key]) for rank in found for key, w in found[0]["changes"].items())
        where = f"a change at each of {len(places)} micro-batches, {on}"
        yield Figure(test=3, name=f"weights apart between ranks, {where}", value=apart, comparison="==", bar=0.0)
        for dtype, bar in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
            apart = max(_distance(found[0]["changes"][key], w) for key, w in expected.items() if key[1] == dtype)
            yield Figure(test=3, name=f"weights apart from one process, {dtype}, {where}", value=apart, bar=bar)


def worst_single(micro_batch_size: int) -> float:
    """Return the largest relative error of any gradient of a float32 run, beside the same run's in float64."""
    data = make_data()
    narrow = TensorDataset(*(t.float() if t.is_floating_point() else t for t in data.tensors))
    optimizer = Recording((model := make_model(dtype=torch.float32)).parameters())
    sizes = [
        d.observation.global_batch_size or 0
        for d in train(make_engine(model, optimizer, narrow, Sizes(), micro_batch_size=micro_batch_size))
    ]
    return _worst(optimizer, sizes, data, None)


def mean_of_means() -> float:
    """Return the smallest error of weighting micro-batches, and not their tokens, equally: what must not be missed."""
    data, before = make_data(), [p.detach() for p in make_model().parameters()]
    rows = torch.arange(12)
    expected = direct_gradient(data, rows, before, "rows")
    errors = []
    for size in (1, 2, 3, 5):
        parts = [direct_gradient(data, part, before, "rows") for part in rows.split(size)]
        errors.append(float((torch.stack(parts).mean(0) - expected).norm() / expected.norm()))
    return min(errors)


def transitions(pairs: list[tuple[int, int]], *, wrapped: bool = False) -> float:
    """Return how far the gradient of a loss whose gradient is 1 for every example ever was from 1.

    Args:
        pairs: Micro-batches a step before and after the change.
        wrapped: Whether the model is in DistributedDataParallel.
    """
    worst = 0.0
    for first, second in pairs:
        model: nn.Module = nn.Linear(1, 1, bias=False)
        model = DistributedDataParallel(model) if wrapped else model
        optimizer = Recording(model.parameters(), lr=0.0)
        data = TensorDataset(torch.ones(16 * (first + second) + 3, 1))
        policy = ada.StagedBatch({0: MICRO * first, 3 * MICRO * first: MICRO * second})
        train(
            make_engine(model, optimizer, data, policy, micro_batch_size=MICRO, epochs=1),
            lambda batch, model=model: model(batch[0]).mean(),
        )
        worst = max(worst, *(abs(float(g) - 1) for g in optimizer.gradients))
    return worst


def cases(places: Any) -> list[tuple[int, torch.dtype]]:
    """Return where the size changes, in samples, in either precision."""
    return [(place, dtype) for place in places for dtype in (torch.float32, torch.float64)]


def changed_at(place: int, dtype: torch.dtype, wrapped: bool = False) -> Tensor:
    """Return the weights of a run whose policy asks for another size from a number of samples on.

    Args:
        place: That number.
        dtype: Precision of model and data.
        wrapped: Whether the model is in DistributedDataParallel.
    """
    model = make_model(dtype=dtype)
    whole = DistributedDataParallel(model) if wrapped else model
    policy = ada.StagedBatch({0: 12, place: 19, place + 41: 7})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(
        make_engine(whole, optimizer, make_data(dtype=dtype), policy, micro_batch_size=MICRO, total_samples=150, seed=3)
    )
    return weights(model)


def of_rank(rank: int, places: list[int], pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """Run everything that needs ranks on one of them."""
    model = make_model()
    optimizer = Recording(model.parameters())
    options = {"micro_batch_size": 5, "measure": EVERYTHING, "min_batch_size": 4, "seed": 3}
    whole = DistributedDataParallel(model)
    engine = make_engine(whole, optimizer, make_data(), Sizes(), **options)
    sizes = [d.observation.global_batch_size for d in train(engine, weighted_loss(whole, "rows"))]
    return {
        "gradients": (optimizer.gradients, optimizer.before, sizes),
        "transitions": transitions([pair for pair in pairs if min(pair) > 1], wrapped=True),
        "changes": {key: changed_at(*key, wrapped=True) for key in cases(places)},
    }


def error_over_ranks(found: dict[str, Any]) -> float:
    """Return the largest relative error of any gradient that a rank's optimizer has seen."""
    optimizer = Recording(make_model().parameters())
    optimizer.gradients, optimizer.before, sizes = found["gradients"]
    return _worst(optimizer, sizes, make_data(), "rows", seed=3)


def _worst(optimizer: Recording, sizes: list[int], data: TensorDataset, weighting: str | None, seed: int = 0) -> float:
    """Compare recorded gradients with those of one backward in float64 over the examples that the stream names."""
    order, start, errors = SampleOrder(len(data), seed), 0, []
    for size, seen, before in zip(sizes, optimizer.gradients, optimizer.before, strict=True):
        expected = direct_gradient(data, order.indices(start, size), [p.double() for p in before], weighting)
        errors.append(float((seen - expected).norm() / expected.norm()))
        start += size
    return max(errors)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
