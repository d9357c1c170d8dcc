"""Ways to shard the small model of the tests, and what is compared: whole weights, gathered from their shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

Shard = Callable[[nn.Sequential], None]


def whole(model: nn.Sequential, **options: Any) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)


def layers(model: nn.Sequential, **options: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def one_part(model: nn.Sequential) -> None:
    fully_shard(model[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def but_biases(model: nn.Sequential) -> None:
    whole(model, ignored_params={p for name, p in model.named_parameters() if "bias" in name})


def low_precision(model: nn.Sequential) -> None:
    layers(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def replicas(model: nn.Sequential) -> None:
    """Shards on pairs of ranks (HSDP)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("copies", "shards"))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_weights(model: nn.Module) -> Tensor:
    """All weights, after gathering; a collective."""
    return torch.cat([gathered(p).detach().flatten() for p in model.parameters()])
