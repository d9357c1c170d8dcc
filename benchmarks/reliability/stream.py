"""Tests 5 and 6: every example once an epoch, from the same workers, whatever the batch size does."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adadagrad.core.records import Observation
from benchmarks.reliability.figure import Figure
from tests.engine.cases import Sizes, make_data, make_engine, make_model
from tests.ranks import on_ranks

EXAMPLES, EPOCHS = 203, 3
POLICY = Sizes(largest=50, seed=1)


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of tests 5 and 6.

    Args:
        reduced: Fewer numbers of workers, and two ranks alone.

    Yields:
        One figure after the other.
    """
    for workers in (0, 2) if reduced else (0, 2, 4):
        for drop_last in (False, True):
            steps = run(loader(workers, drop_last))
            name = f"% of examples exactly once, {workers} workers, drop_last={drop_last}"
            yield Figure(test=5, name=name, value=once([rows for rows, _ in steps]), comparison="==", bar=100.0)
            if workers:
                yield from liveness(steps, workers)
    for ranks in (2,) if reduced else (2, 4):
        found = on_ranks(ranks, of_rank)
        together = [0] * sum(len(part) for steps in found for part in steps)
        for rank, steps in enumerate(found):
            together[rank::ranks] = [row for part in steps for row in part]
        name = f"% of examples exactly once, over {ranks} ranks"
        yield Figure(test=5, name=name, value=once([together]), comparison="==", bar=100.0)


def liveness(steps: list[tuple[list[int], tuple[int, ...]]], workers: int) -> Iterator[Figure]:
    """Yield what a change of size does to the workers: nothing, and at once."""
    sizes = [len(rows) for rows, _ in steps]
    changes = sum(a != b for a, b in pairwise(sizes))
    yield Figure(test=6, name=f"changes of the batch size, {workers} workers", value=changes, comparison=">=", bar=20)
    pids = {pid for _, pids in steps for pid in pids}
    name = f"processes started beyond {workers} workers"
    yield Figure(test=6, name=name, value=len(pids) - workers, comparison="==", bar=0)
    late, seen = 0, 0
    for size in sizes[:-1]:  # what the budget leaves for the last one is less
        late += size != POLICY.required_batch_size(Observation(samples_seen=seen))
        seen += size
    name = f"steps whose size was not the one asked for before them, {workers} workers"
    yield Figure(test=6, name=name, value=late, comparison="==", bar=0)


def loader(workers: int, drop_last: bool) -> DataLoader[Any]:
    """Return a user's loader, with a batch size that must not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of more workers than cores
        return DataLoader(make_data(EXAMPLES), batch_size=64, shuffle=True, num_workers=workers, drop_last=drop_last)


def run(data: Any, model: nn.Module | None = None, **options: Any) -> list[tuple[list[int], tuple[int, ...]]]:
    """Train, and return this rank's rows and its workers' process numbers of each step."""
    engine = make_engine(
        make_model() if model is None else model, None, data, POLICY, epochs=EPOCHS, micro_batch_size=8, **options
    )
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (UserWarning))
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads
        for step in engine:
            rows: list[int] = []
            for batch in step:
                rows += batch[2].tolist()
                step.backward(F.cross_entropy(engine.model(batch[0]), batch[1]))
            steps.append((rows, engine._assembler.source.worker_pids()))
            step.update()
    return steps


def once(steps: list[list[int]]) -> float:
    """Return how many in a hundred examples came exactly once in every epoch of the stream."""
    seen = [row for rows in steps for row in rows]
    good, counted = 0, 0
    for start in range(0, len(seen), EXAMPLES):
        counts = Counter(seen[start : start + EXAMPLES])
        good += sum(counts[row] == 1 for row in range(EXAMPLES))
        counted += EXAMPLES
    return 100.0 * good / counted if counted == EPOCHS * EXAMPLES else 0.0


def of_rank(rank: int) -> list[list[int]]:
    """Return the rows that a rank had in each step; rank r of W has the positions p of the stream with p % W = r."""
    model = DistributedDataParallel(make_model())
    torch.manual_seed(rank)
    return [rows for rows, _ in run(make_data(EXAMPLES), model, min_batch_size=4)]
