"""Two ranks under Fabric, wrapped or sharded: one model, the plain engine's trace, each example once, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import adadagrad as ada
from tests.integrations.fabrics import fabric_of_rank, integration
from tests.integrations.hosts import SETTINGS, make_data, make_model, make_optimizer, plain, policy, sizes, train
from tests.ranks import on_two_ranks

WHOLE = {"measure": ada.Measure(every=1, max_examples=None)}
"""With every example measured nothing depends on the number of ranks, but for rounding."""


def shard(model: Any, mesh: Any) -> Any:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def set_up(rank: int, way: str, dtype: torch.dtype, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return fabric, model and optimizer as Fabric's documentation has them."""
    if way == "ddp":
        fabric, own = fabric_of_rank(rank, strategy="ddp"), make_model(dtype, seed)
        return fabric, *fabric.setup(own, make_optimizer(own))
    from lightning.fabric.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(
        lambda model, mesh: shard(model, mesh["data_parallel"]), data_parallel_size=2, tensor_parallel_size=1
    )
    fabric = fabric_of_rank(rank, strategy=strategy)
    model = fabric.setup_module(make_model(dtype, seed))
    return fabric, model, fabric.setup_optimizers(make_optimizer(model))


def whole(module: nn.Module) -> torch.Tensor:
    """Return a model's weights, put together from their shards."""
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def divergence(own: torch.Tensor) -> float:
    all_of_them = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(all_of_them, own)
    return float((all_of_them[0] - all_of_them[1]).abs().max())


def work(rank: int, way: str, dtype: torch.dtype, folder: str) -> dict[str, Any]:
    path, settings = Path(folder) / "state", {**SETTINGS, **WHOLE}
    fabric, model, optimizer = set_up(rank, way, dtype)
    data = make_data(dtype)
    numbered = TensorDataset(*data.tensors, torch.arange(len(data)))
    loader = fabric.setup_dataloaders(DataLoader(numbered, batch_size=7, shuffle=True))
    engine = integration.adaptive_batch(fabric, model, optimizer, loader, policy(), **settings)
    trace, read, apart = [], [], 0.0
    for step in engine:
        for inputs, targets, index in step:
            read.append(index)
            step.backward(F.cross_entropy(model(inputs), targets))
        decision = step.update()
        trace.append((decision.plan.global_batch_size, float(decision.observation.loss or 0.0)))
        apart = max(apart, divergence(whole(engine.parallel.module)))
        if engine.steps == 5:
            fabric.save(path, {"model": model, "optimizer": optimizer, "engine": integration.Progress(engine)})
    weights = whole(engine.parallel.module)

    fabric, model, optimizer = set_up(rank, way, dtype, seed=5)
    second = integration.adaptive_batch(fabric, model, optimizer, data, policy(), **settings)
    raw: dict[str, Any] = {"model": model, "optimizer": optimizer, "engine": integration.Progress(second)}
    fabric.load(path, raw)
    raw_steps = second.steps
    integration.load(fabric, path, {"model": model, "optimizer": optimizer, "engine": integration.Progress(second)})
    rest = train(second, model)

    own = make_model(dtype)
    own = DistributedDataParallel(own) if way == "ddp" else shard(own, dist.init_device_mesh("cpu", (2,)))
    alone = ada.AdaptiveBatch(own, make_optimizer(own), data, policy(), **settings)
    return {
        "way": type(engine.parallel).__name__,
        "trace": trace,
        "apart": apart,
        "weights": weights,
        "read": torch.cat(read),
        "raw steps": raw_steps,
        "rest": rest,
        "weights again": whole(second.parallel.module),
        "plain": train(alone, own),
        "plain weights": whole(alone.parallel.module),
    }


CASES = [("ddp", torch.float32), ("ddp", torch.float64), ("fsdp2", torch.float64)]


@pytest.fixture(scope="module", params=CASES, ids=str)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(work, *request.param, str(tmp_path_factory.mktemp("state")))


def test_the_ranks_hold_one_model_after_every_step(found: list[dict[str, Any]]) -> None:
    assert {rank["way"] for rank in found} < {"DataParallel", "FullyShard"}
    assert [rank["apart"] for rank in found] == [0.0, 0.0]


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


def test_fabrics_checkpoint_resumes_bit_for_bit(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["rest"] == rank["trace"][5:]
        assert torch.equal(rank["weights again"], rank["weights"])


def test_raw_fabric_forgets_the_engine_where_it_shards(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["raw steps"] == (0 if rank["way"] == "FullyShard" else 5)
