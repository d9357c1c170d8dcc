"""Lightning Fabric: an engine on what ``fabric.setup`` returns.

Needs the extra ``lightning``. Fabric leaves the loop to the user, so the loop becomes the engine's and the rest stays:

    fabric = Fabric(precision="bf16-mixed")
    fabric.launch()
    model, optimizer = fabric.setup(model, optimizer)
    engine = adaptive_batch(fabric, model, optimizer, data, NormTest(eta=0.25), epochs=10)
    for step in engine:
        step.run(lambda batch: loss_fn(model(batch[0]), batch[1]))
        log_decision(fabric, step.update())
    state = {"model": model, "optimizer": optimizer, "engine": Progress(engine)}
    fabric.save("run.ckpt", state)  # and load(fabric, "run.ckpt", state) before the loop

`docs/fabric.md` says what is refused, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from adadagrad.batching.prepared import plain_loader
from adadagrad.core.errors import InvalidArgument, MissingExtra
from adadagrad.core.protocols import BatchSizePolicy
from adadagrad.core.records import Decision
from adadagrad.engine import AdaptiveBatch
from adadagrad.engine.progress import Progress
from adadagrad.integrations.metrics import decision_metrics

try:
    from lightning.fabric import Fabric, is_wrapped
    from lightning.fabric.plugins.precision.amp import MixedPrecision
    from lightning.fabric.plugins.precision.precision import Precision
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
    from lightning.fabric.strategies.single_device import SingleDeviceStrategy
except ImportError as missing:
    raise MissingExtra("lightning", "lightning") from missing

__all__ = ["Progress", "adaptive_batch", "load", "log_decision"]

STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
"""Ways in which Fabric runs a model that leave the gradient to the engine."""


def adaptive_batch(
    fabric: Fabric, model: nn.Module, optimizer: Any, data: Any, policy: BatchSizePolicy, **options: Any
) -> AdaptiveBatch:
    """Make an engine that trains what Fabric has set up, in Fabric's precision and on its ranks.

    The loss function calls the model that ``fabric.setup`` returned. Its backward is ``fabric.backward``; the optimizer
    steps without Fabric's wrapper, whose callbacks ``on_after_optimizer_step`` are not called.

    Args:
        fabric: The user's, launched.
        model: What ``fabric.setup`` returned for the model.
        optimizer: What it returned for the optimizer.
        data: A data set or a DataLoader, also one of ``fabric.setup_dataloaders``; its sampler is not used.
        policy: As for `AdaptiveBatch`.
        **options: Everything else that `AdaptiveBatch` takes, but for `parallel` and `grad_scaler`.

    Returns:
        The engine.

    Raises:
        InvalidArgument: Something was not set up by Fabric, Fabric shards or scales in a way of its own, or as for
            `AdaptiveBatch`.

    Example:
        >>> from adadagrad import NormTest
        >>> fabric, own = Fabric(accelerator="cpu", devices=1), torch.nn.Linear(2, 1)
        >>> model, optimizer = fabric.setup(own, torch.optim.Adagrad(own.parameters(), lr=0.1))
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 2))
        >>> engine = adaptive_batch(fabric, model, optimizer, data, NormTest(eta=0.5), global_batch_size=8, epochs=1)
        >>> for step in engine:
        ...     step.run(lambda batch: model(batch[0]).square().mean())
        ...     decision = step.update()
        >>> engine.samples_seen
        64
    """
    if not isinstance(fabric, Fabric):
        raise InvalidArgument(f"fabric must be a lightning.fabric.Fabric, got {fabric!r:.80}")
    for name in sorted({"parallel", "grad_scaler"} & set(options)):
        raise InvalidArgument(f"{name} is Fabric's own: leave it out")
    _refuse_ways_of_its_own(fabric)
    for name, value in (("model", model), ("optimizer", optimizer)):
        if not is_wrapped(value):
            raise InvalidArgument(
                f"{name} was not set up by Fabric, which would neither place nor save it: write "
                "model, optimizer = fabric.setup(model, optimizer) first"
            )
    scaler = _scaler(fabric.strategy.precision)
    engine = AdaptiveBatch(_trained(model), optimizer.optimizer, _plain(data), policy, grad_scaler=scaler, **options)
    engine.differentiate = _backward(fabric, scaler)
    return engine


def load(fabric: Fabric, path: str | Path, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Load what ``fabric.save`` wrote, and continue there, under every strategy.

    ``fabric.load`` itself hands `Progress` its state under most of them. Under sharding ones it only puts the state in
    the place of the object, so that the engine would begin anew.

    Args:
        fabric: The user's; called on all ranks.
        path: The file or folder.
        state: As for ``fabric.save``: model, optimizer and the engine's `Progress`, and what else was saved.
        **options: As for ``fabric.load``.

    Returns:
        What was saved and `state` does not ask for.

    Raises:
        StepError: A step is in progress.
        InvalidArgument: As for `AdaptiveBatch.load_progress_state`.
    """
    waiting = {name: held for name, held in state.items() if isinstance(held, Progress)}
    state |= {name: state.pop(name) for name in waiting}  # behind model and optimizer, which come first
    left: dict[str, Any] = fabric.load(path, state, **options)
    for name, progress in waiting.items():
        if state[name] is not progress:
            progress.load_state_dict(state[name])
            state[name] = progress
    return left


def log_decision(fabric: Fabric, decision: Decision, **metrics: float) -> None:
    """Send what a step has shown and decided to Fabric's loggers.

    Under the number of the step, with ``samples_seen`` beside it to draw by: the work that a step does changes with its
    batch, so that curves over steps of two runs cannot be compared.

    Args:
        fabric: The user's; without loggers nothing happens.
        decision: What ``step.update()`` returned.
        **metrics: More numbers for the same line, by name.
    """
    fabric.log_dict({**decision_metrics(decision), **metrics}, step=decision.step)


def _refuse_ways_of_its_own(fabric: Fabric) -> None:
    strategy, precision = fabric.strategy, fabric.strategy.precision
    if not isinstance(strategy, STRATEGIES):
        raise InvalidArgument(
            f"fabric runs by {type(strategy).__name__}, which owns gradients or sharding itself: use "
            'strategy="ddp", or ModelParallelStrategy with fully_shard (FSDP2)'
        )
    if type(precision).__module__.endswith(("transformer_engine", "bitsandbytes")):
        raise InvalidArgument(
            f'fabric computes by {type(precision).__name__}, which has not been tried: use precision="bf16-mixed"'
        )


def _trained(model: nn.Module) -> nn.Module:
    """Return what Fabric's wrapper calls: the DistributedDataParallel inside it, or else the user's own module."""
    inside = (part for part in model.modules() if isinstance(part, DistributedDataParallel))
    own: nn.Module = model.module  # type: ignore[assignment]
    return next(inside, own)


def _plain(data: Any) -> Any:
    """Return data without Fabric's wrapper and samplers; its loader keeps the user's in ``_dataloader`` alone."""
    if is_wrapped(data):
        return plain_loader(data._dataloader)
    return plain_loader(data) if isinstance(data, DataLoader) else data


def _scaler(precision: Precision) -> torch.amp.GradScaler | None:
    """Return the scale of float16's losses, where there is one."""
    return precision.scaler if isinstance(precision, MixedPrecision) else None


def _backward(fabric: Fabric, scaler: torch.amp.GradScaler | None) -> Callable[[Tensor], None]:
    """Return Fabric's backward of a loss that the engine has scaled already, as Fabric is about to do."""
    if scaler is None:
        return fabric.backward
    return lambda loss: fabric.backward(loss / scaler.get_scale())
