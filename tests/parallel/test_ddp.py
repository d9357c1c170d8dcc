"""Many ranks under DistributedDataParallel train as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, RanksDisagree
from tests.engine.cases import Sizes, make_data, make_engine, make_model, train, weights
from tests.ranks import on_ranks

POLICIES = {
    "random sizes": (Sizes(), {"micro_batch_size": 7, "min_batch_size": 4}),
    "norm test, all measured": (
        ada.NormTest(eta=0.7),
        {"measure": ada.Measure(every=1, max_examples=None), "micro_batch_size": 9},
    ),
    "inner products": (
        ada.AugmentedInnerProductTest(theta=0.9, nu=6.0),
        {"measure": ada.Measure(every=1, max_examples=None), "micro_batch_size": 9},
    ),
    "coordinates": (
        ada.CoordinateNormTest(eta=0.9, reduction="blocks"),
        {"measure": ada.Measure(every=1, max_examples=None), "micro_batch_size": 9},
    ),
}


def run(name: str, dtype: torch.dtype, wrapped: bool) -> tuple[list[int], list[float], torch.Tensor]:
    policy, options = POLICIES[name]
    model = make_model(dtype=dtype)
    whole = DistributedDataParallel(model) if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    start = {} if name == "random sizes" else {"global_batch_size": 6}
    engine = make_engine(
        whole, optimizer, make_data(dtype=dtype), policy, total_samples=900, seed=3, **(start | options)
    )
    decisions = train(engine)
    return (
        [d.plan.global_batch_size for d in decisions],
        [d.observation.loss for d in decisions],
        weights(model),
    )


def of_rank(rank: int) -> Any:
    return {(name, dtype): run(name, dtype, True) for name in POLICIES for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize("ranks", [2, 4])
def test_same_trace_and_weights_as_one_process(ranks: int) -> None:
    found = on_ranks(ranks, of_rank)
    assert not dist.is_initialized()
    for (name, dtype), (sizes, losses, w) in found[0].items():
        for other in found[1:]:
            assert other[name, dtype][0] == sizes
            assert other[name, dtype][1] == losses
            assert torch.equal(other[name, dtype][2], w)
        expected = run(name, dtype, False)
        assert len(sizes) > 5
        assert sizes == expected[0] or dtype == torch.float32, name
        bar = 1e-6 if dtype == torch.float32 else 1e-12
        if sizes == expected[0]:
            assert float((w - expected[2]).abs().max()) <= bar
            assert losses == pytest.approx(expected[1], abs=bar)


def saved_and_loaded(rank: int, folder: str) -> Any:
    """A run that is saved in the middle and goes on in another engine, with dropout of its own on every rank."""

    def engine() -> Any:
        model = make_model(dropout=0.3)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
        return make_engine(DistributedDataParallel(model), optimizer, policy=Sizes(), min_batch_size=4, seed=3)

    whole = engine()
    sizes = [d.plan.global_batch_size for d in train(whole)]
    first = engine()
    seen = [d.plan.global_batch_size for d in train(first, steps=6)]
    first.save(f"{folder}/run.pt")
    torch.manual_seed(rank)
    second = engine()
    second.load(f"{folder}/run.pt")
    seen += [d.plan.global_batch_size for d in train(second)]
    draws = torch.rand(3)
    return sizes, seen, weights(whole.model), weights(second.model), draws


def test_a_run_resumes_bit_for_bit_on_every_rank(tmp_path: Any) -> None:
    found = on_ranks(2, saved_and_loaded, str(tmp_path))
    for sizes, seen, whole, resumed, _ in found:
        assert seen == sizes
        assert torch.equal(whole, resumed)
    assert torch.equal(found[0][2], found[1][2])
    assert not torch.equal(found[0][4], found[1][4])  # dropout differs between ranks


def other_seeds(rank: int) -> Any:
    model = make_model()
    engine = make_engine(DistributedDataParallel(model), policy=ada.ConstantBatch(8 + rank), data=make_data())
    with pytest.raises(RanksDisagree, match="and another rank is not"):
        train(engine)
    with pytest.raises(InvalidArgument, match="plain module in one of 2 processes"):
        make_engine(make_model())
    return True


def test_ranks_that_have_come_apart_are_found_before_the_update() -> None:
    assert on_ranks(2, other_seeds) == [True, True]
