"""The loop over a run's steps: what comes before each of them, and what leaving it early means."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from adadagrad.batching import make_plan
from adadagrad.core.errors import StepError
from adadagrad.engine.deciding import is_final
from adadagrad.engine.local_step import settle
from adadagrad.engine.log_records import end_record, start_record
from adadagrad.engine.step import Step
from adadagrad.engine.stopping import leave_if_agreed, stopping
from adadagrad.statistics.compiled import compiled_modules

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch


def every_step(engine: AdaptiveBatch) -> Iterator[Step]:
    """Yield one step after the other until the budget is used; see `AdaptiveBatch.__iter__`.

    Args:
        engine: The engine.

    Yields:
        The step to run and update.

    Raises:
        StepError: The last step was not updated, or another loop over this engine is in the middle of one.
    """
    if engine._step is not None and not engine._step.finished:
        raise StepError(
            "another loop over this engine is in the middle of a step: finish that step with step.update() first, "
            "or leave that loop"
        )
    begin(engine)
    engine._compiled = bool(compiled_modules(engine.model))
    with stopping(engine):
        try:
            while engine.progress < engine.total_samples:
                engine._started = time.perf_counter()
                engine._gradients.refuse_leftovers()
                engine.parallel.begin_step(engine.steps + 1, engine.samples_seen)
                step = engine._step = next_step(engine)  # from here on it can be undone
                engine.learning_rate.begin(step.global_batch_size)
                yield step
                if not step.finished:
                    raise StepError(
                        "the update of this step failed, and the step was undone: mend the error that it raised, and "
                        "iterate the engine again"
                        if step.undone
                        else "a step was left without update: call step.update() before the next step"
                    )
                engine._step = None
                leave_if_agreed(engine)
            settle(engine)
            engine._log.write("end", end_record(engine))
        finally:
            if engine._step is not None:
                engine.abandon(engine._step)
            engine._assembler.source.close()
            engine._log.close()


def begin(engine: AdaptiveBatch) -> None:
    """Write the start record, if this run has none.

    Args:
        engine: The engine.
    """
    if not engine._begun:
        engine._log.refuse_other()
        engine._log.write("start", start_record(engine))
        engine._begun = True


def next_step(engine: AdaptiveBatch) -> Step:
    """Plan the step that comes next; nothing is read yet.

    Args:
        engine: The engine, between two steps.

    Returns:
        The step.
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
    return Step(engine, engine.steps + 1, plan, size, split)
