"""A run that was saved on some ranks goes on with as many, bit for bit, or with another number, in the same order.

DistributedDataParallel arranges its buckets anew after its first step, which changes the order in which more than two
ranks' gradients are added: there a resumed run is the same to rounding, and bit for bit with
find_unused_parameters=True, under which buckets stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.core.errors import CorruptCheckpoint
from tests.engine.cases import WHOLE, make_engine, make_model, train, weights
from tests.ranks import on_ranks

FULL = ada.Measure(every=1, max_examples=None)


def build(folder: str | None, ranks: int, dropout: float = 0.0, **options: Any) -> Any:
    model = make_model(dropout)
    return make_engine(
        DistributedDataParallel(model, find_unused_parameters=ranks > 2) if ranks > 1 else model,
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        policy=ada.NormTest(eta=0.7),
        measure=FULL,
        global_batch_size=6,
        log_dir=folder,
        total_samples=900,
        seed=2,
        **options,
    )


def trace(decisions: list[Any]) -> list[tuple[int, float]]:
    return [(d.plan.global_batch_size, d.observation.loss) for d in decisions]


def every_step(rank: int, ranks: int, folder: str, stride: int) -> Any:
    """Save after every step of a run with dropout, and go on from each of them to the end."""
    whole = build(f"{folder}/whole", ranks, 0.3)
    saved, found = 0, []
    expected = []
    for step in whole:
        step.run(lambda batch: torch.nn.functional.cross_entropy(whole.model(batch[0]), batch[1]))
        expected += trace([step.update()])
        whole.save(f"{folder}/{whole.steps}.pt")
        saved += 1
    for k in range(1, saved + 1, stride):
        torch.manual_seed(k)
        again = build(None, ranks, 0.3)
        again.load(f"{folder}/{k}.pt")
        rest = trace(train(again)) if k < saved else []
        same = torch.equal(weights(again.parallel.module), weights(whole.parallel.module))
        found.append(rest == expected[k:] and same)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_from_any_step_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    for found in on_ranks(ranks, every_step, ranks, str(tmp_path), 1 if WHOLE else 4):
        assert len(found) >= 3
        assert all(found)


def part(rank: int, ranks: int, folder: str, steps: int | None) -> Any:
    engine = build(folder, ranks, micro_batch_size={1: 16, 2: 7, 4: 5}[ranks])
    engine.resume()
    decisions = trace(train(engine, steps=steps))
    engine.checkpoint()
    return decisions, weights(engine.parallel.module)


def test_across_numbers_of_ranks_and_sizes_of_micro_batches(tmp_path: Path) -> None:
    whole = build(None, 1)
    expected = trace(train(whole))
    folder, found = str(tmp_path), []
    for ranks, steps in ((1, 3), (2, 3), (4, 3), (2, 2), (1, None)):
        if ranks == 1:
            decisions, w = part(0, 1, folder, steps)
        else:
            decisions, w = on_ranks(ranks, part, ranks, folder, steps)[0]
        found += decisions
    assert [size for size, _ in found] == [size for size, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-10)
    assert float((w - weights(whole.model)).abs().max()) < 1e-10


def damaged(rank: int, folder: str) -> str:
    engine = build(None, 2)
    own = Path(folder) / f"{rank}.pt"
    engine.save(Path(folder) / "good.pt")
    own.write_bytes((Path(folder) / "good.pt").read_bytes()[: -400 if rank else None])
    before = weights(engine.parallel.module)
    with pytest.raises(CorruptCheckpoint, match=r"0\.pt cannot be read on 1 other" if rank == 0 else r"1\.pt"):
        engine.load(own)
    return str(torch.equal(before, weights(engine.parallel.module)))


def test_a_file_that_is_bad_on_one_rank_is_bad_for_all(tmp_path: Path) -> None:
    assert on_ranks(2, damaged, str(tmp_path)) == ["True", "True"]
