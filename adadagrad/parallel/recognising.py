"""From a model, as the user's script has made it, to the way in which its steps run on many devices."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.errors import InvalidArgument
from adadagrad.parallel.base import AbstractParallel
from adadagrad.parallel.ddp import DataParallel
from adadagrad.parallel.single import SingleProcess


def recognise(model: nn.Module, parallel: AbstractParallel | None = None) -> AbstractParallel:
    """Return how a model's steps run.

    Args:
        model: A plain module, one in `DistributedDataParallel`, or one that `fully_shard` has sharded.
        parallel: What the user says instead; None goes by the model.

    Returns:
        The way.

    Raises:
        InvalidArgument: `parallel` is something else or made for another model, or there are several processes and
            nothing that would keep their models equal.
    """
    if parallel is not None:
        if not isinstance(parallel, AbstractParallel):
            raise InvalidArgument(
                f"parallel must be an AbstractParallel, such as SingleProcess(model), or None, got {parallel!r}"
            )
        own = model.module if isinstance(model, DistributedDataParallel) else model
        if parallel.module is not own:
            raise InvalidArgument("parallel was made for another model: give it the model that the engine is given")
        return parallel
    if isinstance(model, nn.DataParallel):
        raise InvalidArgument(
            "model is wrapped in nn.DataParallel, which hides its ranks: use DistributedDataParallel and torchrun"
        )
    if isinstance(model, DistributedDataParallel):
        return DataParallel(model)
    if is_sharded(model):
        from adadagrad.parallel.fsdp import FullyShard

        return FullyShard(model)
    started = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    started = max(started, int(os.environ.get("WORLD_SIZE") or 1) if "LOCAL_RANK" in os.environ else 1)
    if started > 1:
        raise InvalidArgument(
            f"model is a plain module in one of {started} processes, which would train apart from each other: wrap it "
            "in DistributedDataParallel or shard it with fully_shard first, or pass parallel=SingleProcess(model) if "
            "that is meant"
        )
    return SingleProcess(model)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `fully_shard` has sharded a module or a part of it."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
