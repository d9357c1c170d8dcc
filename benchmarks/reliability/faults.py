"""Tests 13, 14, 16 and 17: what goes wrong on one rank is known to all, and costs no more than it must."""

from __future__ import annotations

import math
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from benchmarks.reliability.figure import Figure
from tests.engine import test_out_of_memory as memory
from tests.engine.cases import make_data, make_engine, make_model, mean_loss, read_log, train, weights
from tests.parallel.test_faults import every_place, one_is_not_finite
from tests.ranks import on_ranks

PLACES = ("forward", "backward", "update", "between")
"""Where in a step a signal finds a rank."""


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of tests 13, 14, 16 and 17.

    Args:
        reduced: 8 signals in the place of 50, 2 ranks alone.

    Yields:
        One figure after the other.
    """
    for ranks, runs in ((2, 8),) if reduced else ((2, 40), (4, 10)):
        yield from signals(ranks, runs)
    yield from not_finite()
    yield from out_of_memory(reduced)
    yield from overflow()


def signals(ranks: int, runs: int) -> Iterator[Figure]:
    """Yield what a SIGTERM to one rank does."""
    with tempfile.TemporaryDirectory() as folder:
        found = on_ranks(ranks, told_to_stop, ranks, runs, folder)
        expected = read_log(Path(folder) / "whole")
        same = sum(read_log(Path(folder) / str(number)) == expected for number in range(runs))
    left = sum(all(rank[0][number] == 143 for rank in found) for number in range(runs))
    name = f"of {runs} signals to one of {ranks} ranks all ranks left with 143, none hung"
    yield Figure(test=13, name=name, value=left, comparison="==", bar=runs)
    yield Figure(test=13, name="of them went on to the uninterrupted trace", value=same, comparison="==", bar=runs)
    took = [max(rank[1][number][1] for rank in found) - found[0][1][number][0] for number in range(runs)]
    yield Figure(test=13, name="seconds from signal to the last exit, at most", value=max(took), bar=30)
    apart = sum(not torch.equal(rank[2], found[0][2]) for rank in found)
    yield Figure(test=13, name="ranks that ended with other weights", value=apart, bar=0)


def told_to_stop(rank: int, ranks: int, runs: int, folder: str) -> tuple[list[Any], list[Any], torch.Tensor]:
    """Run, get the signal at a random place of a random step, go on in a new engine.

    Args:
        rank: This rank.
        ranks: How many there are.
        runs: How often.
        folder: Where the runs' folders are made.

    Returns:
        The exit status of each run, its times of signal and exit, and the weights at the end of the last one.
    """
    codes, times, choose = [], [], random.Random(0)
    train(_stoppable(f"{folder}/whole", ranks))
    engine: Any = None
    for number in range(runs):
        victim, at, place = choose.randrange(ranks), choose.randrange(1, 12), choose.choice(PLACES)
        engine = _stoppable(f"{folder}/{number}", ranks)
        sent: list[float] = []
        code = None
        try:
            _signalled(engine, at, place if rank == victim else None, sent)
        except SystemExit as status:
            code = status.code
        left_at = time.time()
        codes.append(code)
        times.append((max(engine.parallel.ranks.gather(sent[0] if sent else 0.0)), left_at))
        engine = _stoppable(f"{folder}/{number}", ranks)
        if engine.resume():
            train(engine)
    return codes, times, weights(engine.parallel.module)


def _stoppable(folder: str, ranks: int) -> Any:
    model = make_model(0.3)
    torch.manual_seed(3)
    return make_engine(
        DistributedDataParallel(model, find_unused_parameters=ranks > 2),  # whose buckets stay, over a resume
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        policy=ada.NormTest(eta=0.6),
        measure=ada.Measure(every=1, max_examples=None),
        global_batch_size=8,
        max_batch_size=64,
        total_samples=600,
        log_dir=folder,
        checkpoint_every=10**9,
    )


def _signalled(engine: Any, at: int, place: str | None, sent: list[float]) -> None:
    def tell(here: str) -> None:
        if not sent and here == place and engine.steps + (here != "between") == at:
            sent.append(time.time())
            os.kill(os.getpid(), signal.SIGTERM)

    def loss(batch: Any) -> torch.Tensor:
        tell("forward")
        value = mean_loss(engine.model)(batch)
        value.register_hook(lambda gradient: tell("backward"))
        return value

    for step in engine:
        step.run(loss)
        tell("update")
        step.update()
        tell("between")


def not_finite() -> Iterator[Figure]:
    """Yield what a loss or gradient that is not finite on one rank does to all."""
    for kind in ("loss", "gradient"):
        found = on_ranks(2, one_is_not_finite, kind)
        good = sum(rank[0].count("skipped: non-finite") == rank[2] == 2 for rank in found)
        name = f"of 2 ranks left out both steps with a {kind} that is not finite on one of them"
        yield Figure(test=14, name=name, value=good, comparison="==", bar=2)
        apart = float((found[0][-1] - found[1][-1]).abs().max())
        yield Figure(test=14, name="difference of their weights afterwards", value=apart, bar=0)
    changed = on_ranks(2, bad_statistic)
    yield Figure(test=14, name="changes of the batch size by a statistic of NaN", value=max(changed), bar=0)


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
    places = [place for _, found in on_ranks(2, every_place) for place in found.values()]
    name = f"of {len(places)} places on 2 ranks: one update, the same bits as smaller micro-batches"
    yield Figure(test=16, name=name, value=sum(places), comparison="==", bar=len(places))


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
