"""What ``Accelerator.prepare`` has made of a script's objects, as the engine takes them.

Nothing of Accelerate is imported: the engine knows what it needs of an `Accelerator` by `core.protocols.Accelerating`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adadagrad.batching.prepared import plain_loader
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import Accelerating
from adadagrad.engine.progress import Progress

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch

REFUSED = {
    "DEEPSPEED": "DeepSpeed owns the gradient and the optimizer's step",
    "MEGATRON_LM": "Megatron-LM owns the loop and the number of micro-batches",
    "XLA": "gradients of XLA devices are reduced inside the optimizer's step",
}
"""Ways of running that leave the engine nothing to do, and why."""


@runtime_checkable
class Wrapping(Protocol):
    """An optimizer around an optimizer, as ``Accelerator.prepare`` makes it."""

    optimizer: torch.optim.Optimizer
    """The optimizer inside."""


def accelerated(
    accelerator: Accelerating | None, model: Any, optimizer: Any, data: Any, grad_scaler: Any
) -> tuple[torch.optim.Optimizer, Any, Any]:
    """Return what the engine works with, after checking that the accelerator leaves it the loop.

    Args:
        accelerator: The user's; None leaves the other arguments as they are.
        model: The model that it has prepared.
        optimizer: The optimizer that it has prepared.
        data: A data set, a DataLoader, or a DataLoader that it has prepared.
        grad_scaler: The engine's argument, in the place of which the accelerator's own scaler comes.

    Returns:
        The optimizer without its wrapper, the data without the accelerator's samplers, and the scaler or None.

    Raises:
        InvalidArgument: It is no accelerator, or one that accumulates gradients, shards or scales in a way of its own;
            or something was not prepared, is given twice, or owns the learning rate.
    """
    if accelerator is None:
        return optimizer, data, grad_scaler
    if not isinstance(accelerator, Accelerating):
        raise InvalidArgument(f"accelerator must be an accelerate.Accelerator or None, got {accelerator!r:.80}")
    _refuse_ways_of_its_own(accelerator)
    if grad_scaler is not None:
        raise InvalidArgument("grad_scaler is the accelerator's own where there is an accelerator: leave it out")
    _refuse_unprepared(model, optimizer)
    while isinstance(optimizer, Wrapping):
        optimizer = optimizer.optimizer
    if getattr(optimizer.step, "_wrapped_by_lr_sched", False):
        raise InvalidArgument(
            "a torch scheduler is attached to the optimizer and counts its steps, whose number an adaptive run does "
            "not know beforehand: take it out, and pass lr_schedule=CosineSchedule(...) or another one that counts "
            "samples"
        )
    if accelerator.is_fsdp2:
        _forget_replaced(optimizer)
    return optimizer, plain_loader(data) if isinstance(data, DataLoader) else data, accelerator.scaler


def enrol(engine: AdaptiveBatch, accelerator: Accelerating | None) -> None:
    """Let the accelerator's checkpoints hold how far the engine is, beside the model and optimizer that they hold.

    Args:
        engine: The engine, made.
        accelerator: The user's; None does nothing.
    """
    if accelerator is not None:
        accelerator.register_for_checkpointing(Progress(engine))


def _refuse_ways_of_its_own(accelerator: Accelerating) -> None:
    steps, way = accelerator.gradient_accumulation_steps, str(accelerator.distributed_type.value)
    if steps != 1:
        raise InvalidArgument(
            f"accelerator accumulates gradients over {steps} micro-batches by itself, which the engine does by the "
            "batch size: make it with gradient_accumulation_steps=1, and say micro_batch_size=... to the engine"
        )
    if way in REFUSED:
        raise InvalidArgument(
            f"accelerator runs under {way}: {REFUSED[way]}, so that the batch size cannot be changed from outside; use "
            "DistributedDataParallel or FSDP2"
        )
    if way == "FSDP" and not accelerator.is_fsdp2:
        raise InvalidArgument(
            "accelerator shards by FSDP1, whose flat parameters show no gradient of their own: use "
            "FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if accelerator.mixed_precision == "fp8":
        raise InvalidArgument('accelerator computes in fp8, which has not been tried: use mixed_precision="bf16"')


def _forget_replaced(optimizer: torch.optim.Optimizer) -> None:
    """Drop what an optimizer has made at its construction for parameters that sharding has replaced since.

    Torch's Adagrad makes its sums then. Nothing reaches the old ones any more but the optimizer's own ``state_dict``,
    and so ``accelerator.save_state``, which fail over them; for the new parameters they are made at the first step.
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for p in [p for p in optimizer.state if isinstance(p, Tensor) and p not in held]:
        del optimizer.state[p]


def _refuse_unprepared(model: Any, optimizer: Any) -> None:
    """Refuse what the accelerator's checkpoints would silently leave out: it saves what it has prepared only."""
    wrapped = isinstance(model, DistributedDataParallel)  # which older versions do not mark
    prepared = {
        "model": not isinstance(model, nn.Module) or wrapped or getattr(model, "_is_accelerate_prepared", False),
        "optimizer": not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, Wrapping),
    }
    for name, is_prepared in prepared.items():
        if not is_prepared:
            raise InvalidArgument(
                f"{name} was not prepared by the accelerator, which would neither place nor save it: write "
                "model, optimizer = accelerator.prepare(model, optimizer) first"
            )
