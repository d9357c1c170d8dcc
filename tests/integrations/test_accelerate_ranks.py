"""Two ranks under Accelerate: one model, the plain engine's trace, each example once, the same after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import adadagrad as ada
from tests.integrations.accelerators import accelerator_of_rank, make_engine
from tests.integrations.hosts import (
    SETTINGS,
    make_data,
    make_model,
    make_optimizer,
    plain,
    policy,
    sizes,
    train,
    weights,
)
from tests.ranks import on_two_ranks

WHOLE = {"measure": ada.Measure(every=1, max_examples=None)}
"""With every example measured nothing depends on the number of ranks, but for rounding."""


def divergence(engine: Any) -> float:
    """Return by how much the ranks' weights differ at most."""
    own = weights(engine)
    all_of_them = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(all_of_them, own)
    return float((all_of_them[0] - all_of_them[1]).abs().max())


def numbered(dtype: torch.dtype) -> TensorDataset:
    data = make_data(dtype)
    return TensorDataset(*data.tensors, torch.arange(len(data)))


def work(rank: int, dtype: torch.dtype, folder: str) -> dict[str, Any]:
    accelerator = accelerator_of_rank(rank)
    loader = accelerator.prepare(DataLoader(numbered(dtype), batch_size=7, shuffle=True))
    engine = make_engine(accelerator, dtype, data=loader, **WHOLE)
    trace, read, apart = [], [], 0.0
    for step in engine:
        for inputs, targets, index in step:
            read.append(index)
            step.backward(F.cross_entropy(engine.model(inputs), targets))
        decision = step.update()
        trace.append((decision.plan.global_batch_size, float(decision.observation.loss or 0.0)))
        apart = max(apart, divergence(engine))
        if engine.steps == 5:
            accelerator.save_state(folder)
    accelerator = accelerator_of_rank(rank)
    second = make_engine(accelerator, dtype, model_seed=rank + 5, **WHOLE)
    accelerator.load_state(folder)
    rest = train(second, second.model)
    alone = DistributedDataParallel(make_model(dtype))
    ours = ada.AdaptiveBatch(alone, make_optimizer(alone), make_data(dtype), policy(), **{**SETTINGS, **WHOLE})
    return {
        "wrapped": isinstance(engine.model, DistributedDataParallel),
        "trace": trace,
        "apart": apart,
        "weights": weights(engine),
        "read": torch.cat(read),
        "rest": rest,
        "weights again": weights(second),
        "plain": train(ours, alone),
        "plain weights": weights(ours),
    }


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, request.param, str(tmp_path_factory.mktemp("state")))


def test_the_ranks_hold_one_model_after_every_step(found: list[dict[str, Any]]) -> None:
    assert all(rank["wrapped"] for rank in found)
    assert [rank["apart"] for rank in found] == [0.0, 0.0]
    assert torch.equal(found[0]["weights"], found[1]["weights"])


def test_two_ranks_are_the_plain_engines_two_ranks_bit_for_bit(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["trace"] == rank["plain"]
        assert torch.equal(rank["weights"], rank["plain weights"])


def test_two_ranks_are_one_process_to_rounding(found: list[dict[str, Any]]) -> None:
    dtype = found[0]["weights"].dtype
    trace, expected = plain(dtype, **WHOLE)
    if dtype is torch.float64:
        assert sizes(found[0]["trace"]) == sizes(trace)
        assert torch.allclose(found[0]["weights"], expected, rtol=0, atol=1e-12)
    else:  # where a size may round to the other side
        assert max(abs(a - b) for a, b in zip(sizes(found[0]["trace"]), sizes(trace), strict=True)) <= 1


def test_each_example_is_trained_on_once_an_epoch(found: list[dict[str, Any]]) -> None:
    read = torch.cat([rank["read"] for rank in found])
    assert torch.equal(read.bincount(), torch.full((600,), 3))
    assert all(len(rank["read"]) == 900 for rank in found)


def test_load_state_resumes_bit_for_bit(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["rest"] == rank["trace"][5:]
        assert torch.equal(rank["weights again"], rank["weights"])
