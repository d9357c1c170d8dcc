"""Where Lightning's count of an epoch's micro-batches must stand so that it ends with the engine's epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from adadagrad.engine import AdaptiveBatch


def move_to(trainer: Trainer, engine: AdaptiveBatch, length: int, *, again: bool) -> None:
    """Set the counts of a checkpoint to where the engine is: micro-batches that come again are not done.

    They may also have been counted in another unit: the micro-batch, or the number of ranks, may have changed.

    Args:
        trainer: The trainer, whose counts are as they were saved.
        engine: The engine, where it was saved.
        length: Micro-batches of an epoch.
        again: Whether it was saved in the middle of a step.
    """
    loop = trainer.fit_loop.epoch_loop
    counts: Any = loop.batch_progress
    left = engine.dataset_size - engine.samples_drawn % engine.dataset_size
    begins = left == engine.dataset_size
    place = length - math.ceil(math.ceil(left / engine.parallel.ranks.count) / engine.micro_batch_size)
    if begins and not again and counts.current.ready > 0:
        place = length  # of the epoch that is just over
    # Within `on_train_batch_end` a micro-batch is processed and not yet completed, which Lightning makes up for; one
    # that has failed is not even processed.
    open_ = counts.current.processed == counts.current.ready and counts.current.completed < counts.current.ready
    before = counts.total.ready - counts.current.ready
    for name in ("ready", "started", "processed", "completed"):
        done = place - (open_ and name == "completed")
        setattr(counts.current, name, done)
        setattr(counts.total, name, before + done)
    counts.is_last_batch = place == length
    if again and place:
        trainer.accumulate_grad_batches = place + 1  # the last step before it is in the logger's axis already
    elif again:
        loop.restarting = False  # of this epoch nothing is done
