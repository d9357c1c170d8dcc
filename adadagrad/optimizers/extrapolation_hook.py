"""A look at each rank's own gradient under DistributedDataParallel, which averages gradients during the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.errors import InvalidArgument


def show_before_average(model: nn.Module, show: Callable[[list[Tensor], list[Tensor]], None]) -> None:
    """Have a function called with what a wrapper is about to average, which it then averages as ever.

    Gradients that were accumulated under ``no_sync`` are in it: it is the sum of all since they were cleared.

    Args:
        model: The wrapped model, without a communication hook of its own.
        show: Is called in the backward for each bucket with its parameters and their gradients, which it must copy.

    Raises:
        InvalidArgument: The model is not wrapped, or has a hook.
    """
    if not isinstance(model, DistributedDataParallel):
        raise InvalidArgument(
            f"model must be a DistributedDataParallel, got {type(model).__name__}: a model that is not wrapped "
            "needs no hook"
        )
    if getattr(model, "_comm_hooks", None):
        raise InvalidArgument("model has a communication hook already, and there can be only one")
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def shown(bucket: Any) -> Any:
        show(bucket.parameters(), bucket.gradients())
        return bucket

    # A lambda, since the wrapper reads a hook's annotations, and refuses those that are strings.
    model.register_comm_hook(model.process_group, lambda group, bucket: allreduce_hook(group, shown(bucket)))
