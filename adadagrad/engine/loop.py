"""The loop over a run's steps: what comes before each of them, and what leaving it early means."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from adadagrad.core.errors import StepError
from adadagrad.engine.local_step import settle
from adadagrad.engine.log_records import end_record, start_record
from adadagrad.engine.planning import abandon, plan_next
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
                abandon(engine, engine._step)
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
    """Return the step that comes next; nothing is read yet.

    Args:
        engine: The engine, between two steps.
    """
    plan, size, split = plan_next(engine)
    return Step(engine, engine.steps + 1, plan, size, split)
