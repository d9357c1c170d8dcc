"""Models that Accelerate's FSDP2 plugin has sharded, on two ranks.

Accelerate shards on accelerators alone. So that the plugin, the engine and Accelerate's sharded checkpoints meet here,
it is told that it runs under FSDP, which it would find out by itself on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from tests.integrations.accelerators import accelerate, accelerator_of_rank
from tests.integrations.hosts import SETTINGS, make_data, make_model, policy, sizes, train
from tests.ranks import on_two_ranks

OPTIMIZERS = {
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),  # which has a state from its construction on
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}
OLD = tuple(map(int, accelerate.__version__.split(".")[:2])) < (1, 13)
"""Whether Accelerate forgets to load a sharded optimizer."""
WHOLE = {**SETTINGS, "measure": ada.Measure(every=1, max_examples=None)}


def sharded(rank: int) -> accelerate.Accelerator:
    accelerator = accelerator_of_rank(rank)
    for state in (accelerate.PartialState(), accelerator.state):
        state.distributed_type = accelerate.utils.DistributedType.FSDP
    accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=10,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    return accelerator


def whole(model: Any) -> torch.Tensor:
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])


def work(rank: int, name: str, folder: str) -> dict[str, Any]:
    def make(seed: int) -> Any:
        accelerator, own = sharded(rank), make_model(torch.float64, seed)
        model, optimizer = accelerator.prepare(own, OPTIMIZERS[name](own.parameters()))
        data = make_data(torch.float64)
        engine = ada.AdaptiveBatch(model, optimizer, data, policy(), accelerator=accelerator, **WHOLE)
        return accelerator, model, engine

    accelerator, model, engine = make(0)
    begun = train(engine, model, 4)
    accelerator.save_state(folder)
    rest = train(engine, model)
    accelerator, again, second = make(rank + 5)
    try:
        accelerator.load_state(folder)
        resumed = train(second, again) == rest and torch.equal(whole(again), whole(model))
    except InvalidArgument as refused:
        resumed = str(refused)
    return {
        "way": type(engine.parallel).__name__,
        "units": sum(isinstance(part, FSDPModule) for part in model.modules()),
        "trace": begun + rest,
        "weights": whole(model),
        "resumed": resumed,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OPTIMIZERS) if os.environ.get("ADADAGRAD_SLOW") == "1" else ["adagrad"])
def test_a_sharded_run_is_that_of_one_process_and_resumes_bit_for_bit(name: str, tmp_path: Any) -> None:
    found = on_two_ranks(work, name, str(tmp_path))
    model = make_model(torch.float64)
    engine = ada.AdaptiveBatch(model, OPTIMIZERS[name](model.parameters()), make_data(torch.float64), policy(), **WHOLE)
    expected = train(engine, model)
    alone = torch.cat([p.detach().flatten() for p in model.parameters()])
    for rank in found:
        assert (rank["way"], rank["units"]) == ("FullyShard", 3)
        assert rank["resumed"] is True or (OLD and "Accelerate before 1.13 does not" in rank["resumed"])
        assert sizes(rank["trace"]) == sizes(expected)
        assert torch.allclose(rank["weights"], alone, rtol=0, atol=1e-12)
    assert torch.equal(found[0]["weights"], found[1]["weights"])
