"""Many ranks under DistributedDataParallel train as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
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
