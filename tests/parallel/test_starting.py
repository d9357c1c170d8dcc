"""The same script in one process and under torchrun: `data_parallel` joins where there is something to join."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.parallel import data_parallel, join_process_group, leave_process_group, starting
from tests.engine.cases import Sizes, make_engine, make_model, train, weights
from tests.ranks import on_ranks


def script() -> torch.Tensor:
    """What a user writes, without a word about how many processes there are; the seed is the rank's fault."""
    model = data_parallel(make_model(seed=1 + int(os.environ.get("RANK", 0))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = make_engine(model, optimizer, policy=Sizes(), min_batch_size=2, seed=3, total_samples=300)
    train(engine)
    leave_process_group()
    return weights(engine.parallel.module)


def of_rank(rank: int) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    model = data_parallel(make_model())
    found: dict[str, Any] = {"kind": type(model), "same": data_parallel(make_model()).module is not model}
    try:
        data_parallel(model)
    except InvalidArgument as error:
        found["twice"] = str(error)
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    before, dist.init_process_group = dist.init_process_group, lambda kind: found.update(asked=kind)
    try:
        join_process_group()
    finally:
        dist.init_process_group = before
    for name in ("script", "for on_ranks to leave"):
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=2)
        if name == "script":
            found["weights"], found["left"] = script(), not dist.is_initialized()
    return found


def test_two_ranks_train_as_one_process_does() -> None:
    expected = script()
    for found in on_ranks(2, of_rank):
        assert found["kind"] is DistributedDataParallel
        assert found["twice"].startswith("model is in DistributedDataParallel already")
        assert found["asked"] == "gloo"
        assert found["left"]
        assert float((found["weights"] - expected).abs().max()) <= 1e-12


def test_a_plain_process_is_left_as_it_is() -> None:
    model = nn.Linear(2, 2)
    assert data_parallel(model) is model
    assert join_process_group("cpu") == torch.device("cpu")
    leave_process_group()
    assert not dist.is_initialized()
    assert isinstance(ada.AdaptiveBatch, type)


@pytest.mark.parametrize(("devices", "message"), [(1, "--nproc-per-node 1"), (0, "--nproc-per-node 1")])
def test_more_processes_than_cuda_devices(monkeypatch: pytest.MonkeyPatch, devices: int, message: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(InvalidArgument, match=f"process 1 .* there are {devices}: start torchrun with {message}"):
        starting.local_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert starting.local_device("cuda") == torch.device("cuda", 1)
    assert starting.local_device("cuda:0") == torch.device("cuda", 0)
