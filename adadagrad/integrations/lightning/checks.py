"""What Lightning's Trainer can be asked for and the callback cannot: said before the first step, with the remedy."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.optimizing import Extrapolating
from adadagrad.engine import AdaptiveBatch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from adadagrad.integrations.lightning.loader import AdaptiveLoader


OWNED = {
    "micro_batch_size": "the loader's batch size",
    "max_grad_norm": "Trainer(gradient_clip_val=...)",
    "epochs": "Trainer(max_epochs=...), or total_samples",
    "checkpoint_every": "Lightning's ModelCheckpoint",
    "keep_checkpoints": "Lightning's ModelCheckpoint",
    "epoch_boundary": "'short', because Lightning steps at the end of an epoch",
    "grad_scaler": "Trainer(precision=...)",
    "replay": "out of reach, because Lightning steps the optimizer",
    "parallel": "Trainer(strategy=...)",
    "accelerator": "Trainer(accelerator=...)",
}
"""Arguments of the engine that somebody else sets, and who."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse arguments of the engine that are the Trainer's to set.

    Args:
        settings: What the user gave.

    Raises:
        InvalidArgument: One of them is, or the engine knows no such argument.
    """
    known = inspect.signature(AdaptiveBatch).parameters
    for name in settings:
        if name in OWNED:
            raise InvalidArgument(f"{name} is not the callback's to set: here it is {OWNED[name]}")
        if name not in known:
            raise InvalidArgument(f"{name} is no argument of the callback or of AdaptiveBatch: look at their help")


def check_trainer(
    trainer: Trainer, module: LightningModule, loader: AdaptiveLoader | None, total_samples: int | None
) -> tuple[torch.optim.Optimizer, AdaptiveLoader]:
    """Refuse a trainer whose steps could not be the engine's.

    Args:
        trainer: The trainer, when training starts.
        module: The module.
        loader: The callback's.
        total_samples: The budget; None for `max_epochs`.

    Returns:
        The only optimizer, and the loader.

    Raises:
        InvalidArgument: The loader is not the callback's, or the trainer cuts, scales or makes steps in its own way.
    """
    own = loader if trainer.train_dataloader is loader else None
    if own is None:
        raise InvalidArgument("the training loader must be the callback's: trainer.fit(model, adaptive.loader(loader))")
    if not module.automatic_optimization:
        raise InvalidArgument(
            "automatic_optimization=False leaves the loop to the module: use AdaptiveBatch without a trainer, or "
            "adadagrad.integrations.fabric"
        )
    optimizers = trainer.optimizers
    if len(optimizers) != 1:
        raise InvalidArgument(f"configure_optimizers must return one optimizer, got {len(optimizers)}")
    optimizer = optimizers[0]
    if isinstance(optimizer, Extrapolating):
        raise InvalidArgument(
            f"{type(optimizer).__name__} evaluates gradients away from the parameters, where Lightning may validate in "
            "the middle of a step: use AdaptiveBatch or Fabric"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise InvalidArgument(
            f"strategy {type(trainer.strategy).__name__} is not supported: use one device, 'ddp', or "
            "ModelParallelStrategy with fully_shard in configure_model"
        )
    if trainer.precision == "16-mixed":
        raise InvalidArgument("precision='16-mixed' scales losses, and the noise with them: use 'bf16-mixed' or '32'")
    limit = trainer.limit_train_batches  # the integer 1 is one batch
    if isinstance(limit, int) or limit != 1.0 or trainer.overfit_batches:  # type: ignore[attr-defined]
        raise InvalidArgument(
            "limit_train_batches, fast_dev_run and overfit_batches cut an epoch in the middle of a step: give the "
            "loader a torch.utils.data.Subset instead"
        )
    if any(isinstance(other, GradientAccumulationScheduler) for other in trainer.callbacks):  # type: ignore[attr-defined]
        raise InvalidArgument("GradientAccumulationScheduler sets what the policy decides: take it out of callbacks")
    averaging = any(isinstance(other, StochasticWeightAveraging) for other in trainer.callbacks)  # type: ignore[attr-defined]
    if averaging and StochasticWeightAveraging.pl_module_contains_batch_norm(module):
        raise InvalidArgument(
            "StochasticWeightAveraging of a model with BatchNorm runs an epoch without steps: use EMAWeightAveraging"
        )
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        raise InvalidArgument("reload_dataloaders_every_n_epochs would restart the stream of examples: leave it out")
    if total_samples is None and (trainer.max_epochs is None or trainer.max_epochs < 1):
        raise InvalidArgument("total_samples is needed where max_epochs sets no end: give the callback total_samples")
    least = trainer.min_steps or (trainer.min_epochs or 0) * own.dataset_size > (total_samples or math.inf)
    if total_samples is not None and least:
        raise InvalidArgument("min_steps or min_epochs would go on after total_samples, without data: leave them out")
    return optimizer, own
