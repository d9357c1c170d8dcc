"""Tests 13, 14, 16 and 17: what goes wrong on one rank is known to all, and costs no more than it must."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from benchmarks.reliability.figure import Figure
from benchmarks.reliability.stopping import signals
from tests.engine import test_out_of_memory as memory
from tests.engine.cases import make_data, make_engine, make_model, mean_loss, train
from tests.parallel.test_faults import every_place, one_is_not_finite
from tests.ranks import on_ranks


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of tests 13, 14, 16 and 17.

    Args:
        reduced: 9 signals in the place of 54, 2 ranks alone.

    Yields:
        One figure after the other.
    """
    for ranks, runs, processes in ((2, 8, 1),) if reduced else ((2, 40, 3), (4, 10, 1)):
        yield from signals(ranks, runs, processes)
    found = on_ranks(2, of_rank)
    yield from not_finite(found)
    yield from out_of_memory(reduced)
    for kind, places in found[0]["memory"].items():
        same = sum(all(rank["memory"][kind][place] for rank in found) for place in places)
        name = f"of {len(places)} places on 2 ranks, {kind}: one update, the same bits as smaller micro-batches"
        yield Figure(test=16, name=name, value=same, comparison="==", bar=len(places))
    yield from overflow()


def of_rank(rank: int) -> dict[str, Any]:
    """Run everything that needs two ranks on one of them."""
    return {
        "loss": one_is_not_finite(rank, "loss"),
        "gradient": one_is_not_finite(rank, "gradient"),
        "statistic": bad_statistic(rank),
        "memory": {kind: every_place(rank, kind == "BatchNorm")[1] for kind in ("dropout", "BatchNorm")},
    }


def not_finite(found: list[dict[str, Any]]) -> Iterator[Figure]:
    """Yield what a loss, gradient or statistic that is not finite on one rank does to all.

    Args:
        found: What `of_rank` returned on each rank.

    Yields:
        The figures of test 14.
    """
    for kind in ("loss", "gradient"):
        good = 0
        for reasons, unchanged, held, skipped, *_ in (rank[kind] for rank in found):
            left_out = [k for k, reason in enumerate(reasons) if reason == "skipped: non-finite"]
            good += left_out == [1, 3] and skipped == 2 and all(unchanged[k] and held[k] for k in left_out)
        name = f"of 2 ranks left out, counted, kept weights and size in both steps with a bad {kind} on one"
        yield Figure(test=14, name=name, value=good, comparison="==", bar=2)
        apart = float((found[0][kind][-1] - found[1][kind][-1]).abs().max())
        yield Figure(test=14, name="difference of their weights afterwards", value=apart, bar=0)
    changed = max(rank["statistic"] for rank in found)
    yield Figure(test=14, name="changes of the batch size by a statistic of NaN", value=changed, bar=0)


def bad_statistic(rank: int) -> int:
    """Measure NaN on rank 1 at every third step; return how often the size changed at one of them, or ranks differ."""
    model = make_model()
    engine: Any = make_engine(
        DistributedDataParallel(model),
        torch.optim.SGD(model.parameters(), lr=0.05),
        policy=ada.NormTest(eta=0.6),
        measure=ada.Measure(every=1, max_examples=8),
        global_batch_size=12,
        total_samples=900,
    )
    changed, poisoned, held = 0, 0, []
    for step in engine:
        bad = step.measured and engine.steps % 3 == 2
        step.run(mean_loss(engine.model))
        if bad and rank == 1:
            engine.measuring.instrument._step.sums.squares = math.nan
        decision = step.update()
        held.append(decision.next_plan.global_batch_size)
        if bad:
            poisoned += 1
            changed += decision.next_plan.global_batch_size != decision.plan.global_batch_size
    sizes = engine.parallel.ranks.gather(held)
    assert poisoned > 3
    return changed + (sizes[0] != sizes[-1])


def out_of_memory(reduced: bool) -> Iterator[Figure]:
    """Yield how a step that runs out of memory differs from one in micro-batches of half the size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("norm test", "batch norm") if reduced else tuple(memory.KINDS):
            at = 3
            if kind == "schedule":
                sizes = enumerate(memory.sizes_of(kind))
                at = next(k for k, size in sizes if k > 2 and size > 24)
            worst = 0.0
            random.seed(4)
            expected = memory.build(kind)
            memory.run(expected, at, None, MemoryError(), smaller=4)
            for failing in range(4):
                random.seed(4)
                engine = memory.build(kind)
                memory.run(engine, at, failing, memory.ERRORS["accelerator"])
                worst = max(worst, _apart(engine.model, expected.model))
            name = f"difference of weights and buffers after memory ran out, {kind}, one process"
            yield Figure(test=16, name=name, value=worst, bar=0)


def _apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def overflow() -> Iterator[Figure]:
    """Yield what a loss scale does to statistics in float16, and an overflow to the counters."""
    found: dict[float | None, Any] = {}
    for scale in (None, 2.0**12, 2.0**26):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3))
        engine: Any = make_engine(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            make_data(dtype=torch.float32),
            global_batch_size=64,
            max_batch_size=64,
            total_samples=640,
            measure=ada.Measure(estimator=ada.PerExample(), every=1, max_examples=None),
            bounds=ada.Bounds(monotone=False),
            grad_scaler=None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale),
        )

        def loss(batch: Any, model: nn.Module = model, half: bool = scale is not None) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                output = model(batch[0])
            return nn.functional.cross_entropy(output.float(), batch[1])

        found[scale] = train(engine, loss)[0].observation.gradient
    for number in ("grad_norm_sq", "variance_trace"):
        ratio = getattr(found[2.0**12], number) / getattr(found[None], number)
        yield Figure(test=17, name=f"{number} in float16 with a scale, off by", value=abs(ratio - 1), bar=0.01)
    yield Figure(test=17, name="steps that overflowed", value=engine.skipped, comparison=">=", bar=1)
    gap = engine.samples_drawn - engine.samples_seen - 64 * engine.skipped
    yield Figure(test=17, name="examples of overflowing steps counted as seen", value=abs(gap), bar=0)
