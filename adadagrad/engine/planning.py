"""What the next step will be: planned, planned again in smaller micro-batches, or taken back."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from adadagrad.batching import make_plan
from adadagrad.core.records import BatchPlan
from adadagrad.engine.deciding import is_final
from adadagrad.engine.splitting import Split

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch
    from adadagrad.engine.step import Step


def plan_next(engine: AdaptiveBatch) -> tuple[BatchPlan, int, Split]:
    """Plan the step that comes next.

    Args:
        engine: The engine, between two steps.

    Returns:
        The plan; the examples of this step, fewer than planned only where a run or an epoch ends; and this rank's
        micro-batches of it.
    """
    size = engine.global_batch_size
    if not engine.learning_rate.counts_progress:
        size = min(size, engine.total_samples - engine.samples_seen)
    if engine.epoch_boundary == "short":
        size = min(size, engine._assembler.until_epoch_end)
    whole = size == engine.global_batch_size
    final = is_final(engine.policy, engine.global_batch_size, engine.bounds, engine.max_batch_size)
    parallel = engine.parallel
    wanted = whole and parallel.meets and (not final or engine.measuring.rate_needs)
    plan = make_plan(engine.global_batch_size, engine.micro_batch_size, parallel.ranks.count)
    number = parallel.occasion(engine.steps + 1)
    split = engine.measuring.split(number, engine.share(size), engine.micro_batch_size, wanted=wanted)
    return plan, size, split


def plan_again(engine: AdaptiveBatch, micro_batch_size: int) -> tuple[BatchPlan, Split]:
    """Take back what the step in progress has done and plan it with smaller micro-batches.

    Args:
        engine: The engine.
        micro_batch_size: Most examples in one forward from now on.

    Returns:
        The plan, and this rank's micro-batches.
    """
    engine.measuring.undo()
    engine._gradients.clear()
    engine._assembler.seek(engine.samples_drawn)
    engine.micro_batch_size = micro_batch_size
    engine.memory_retries += 1
    warnings.warn(
        f"memory ran out in step {engine.steps + 1}, which is repeated with micro_batch_size={micro_batch_size}; "
        "the global batch stays",
        stacklevel=3,
    )
    plan, _, split = plan_next(engine)
    return plan, split


def abandon(engine: AdaptiveBatch, step: Step) -> None:
    """Undo a step that is not finished: forget its gradient and let its examples come again.

    Args:
        engine: The engine.
        step: Its step. Nothing is left to undo where it is finished.
    """
    if not step.finished:
        step.undo()
        engine.measuring.undo()
        engine._gradients.clear()
        engine._assembler.seek(engine.samples_drawn)
    engine._step = None
