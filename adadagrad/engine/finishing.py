"""The end of a step: correct, check, clip and apply the gradient, decide the next batch size, write it down."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from adadagrad.batching import make_plan
from adadagrad.core.errors import NonFiniteGradient
from adadagrad.core.optimizing import Reevaluating
from adadagrad.core.records import Decision, GradientStatistics, Observation
from adadagrad.engine.deciding import Answer, decide
from adadagrad.engine.local_step import Late, apply, meet, meet_late, own_part, what_is_not_finite
from adadagrad.engine.log_records import rate_fields, step_record, times
from adadagrad.engine.preparing import Prepared, Seen, prepare_step
from adadagrad.engine.replay import ReplayNotFinite, apply_update
from adadagrad.engine.saving import save_if_due

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch
    from adadagrad.engine.step import Step


MAX_SKIPPED = 50
"""Steps skipped in a row after which a run that never becomes finite again is stopped."""


def finish_step(engine: AdaptiveBatch, step: Step) -> Decision:
    """Apply a complete step, or leave it out, and decide the next batch size; called by `Step.update`.

    Nothing is counted before the optimizer has stepped, so that a step which fails until then can be undone.

    Args:
        engine: The engine.
        step: Its step, all micro-batches of which have had their backward.

    Returns:
        The step's record.

    Raises:
        InvalidArgument: The step's weights add up to 0.
        NonFiniteGradient: Loss or gradient is not finite and ``on_nonfinite="stop"``, or `MAX_SKIPPED` steps in a
            row were skipped.
        ReplayNotFinite: The same where the optimizer has evaluated the batch again.
    """
    if engine.parallel.gradient == "local":
        return _finish_local_step(engine, step)
    prepared = prepare_step(engine, step)
    if prepared.finite:
        try:
            apply_update(engine, step)
        except ReplayNotFinite:
            if engine.on_nonfinite == "stop" or not isinstance(engine.optimizer, Reevaluating):
                raise
            return _skip(engine, step, math.nan)
    return complete_step(engine, step, prepared)


def complete_step(engine: AdaptiveBatch, step: Step, prepared: Prepared) -> Decision:
    """Count a step that the optimizer has made, or leave it out, and decide; called by `Step.complete`.

    Args:
        engine: The engine.
        step: Its step.
        prepared: What `prepare_step` has returned.

    Returns:
        The step's record.

    Raises:
        NonFiniteGradient: Loss or gradient is not finite and ``on_nonfinite="stop"``, or `MAX_SKIPPED` steps in a
            row were skipped.
    """
    if not prepared.finite:
        return _skip(engine, step, prepared.loss)
    _count(engine, step)
    engine.scaling.move(finite=True)
    engine.samples_seen += step.global_batch_size
    engine.learning_rate.advance()
    engine._skipped_in_a_row = 0
    decision = _decide(engine, step, prepared.loss, prepared.lr, prepared.seen, prepared.reason)
    if engine.steps - engine.skipped == 1:
        engine.measuring.check_second_moments()
    return decision


def _finish_local_step(engine: AdaptiveBatch, step: Step) -> Decision:
    """Apply a rank's own step, and decide where the ranks meet."""
    own = own_part(engine, step)
    met = meet(engine, step, own) if engine.parallel.meets else None
    seen, reason = Seen(), "not measured"
    if met is not None and step.measured:
        statistics, reason = engine.measuring.finish(own.examples, met.weight_sq_sum, step.correction, met.failure)
        if statistics is not None:
            engine.learning_rate.measured(statistics)
            combined, reason = engine.measuring.combine(statistics)
            seen = Seen(own=statistics, combined=combined)
    shown = apply(engine, step, own)
    late = Late() if met is None else meet_late(engine)
    if shown is not None:
        combined, reason = engine.measuring.combine(shown)
        seen = Seen(own=shown, combined=combined)
    _count(engine, step)
    engine.samples_seen += step.global_batch_size
    engine.learning_rate.advance()
    if met is not None:
        engine.samples_seen -= met.examples + late.examples
        engine.learning_rate.take_back(met.examples + late.examples)
        engine.skipped += met.updates + late.updates
    loss = step.loss if met is None else met.loss
    decision = _decide(engine, step, loss, engine.learning_rate.current, seen, reason)
    if late.ends:
        raise NonFiniteGradient(what_is_not_finite(late.updates, f"the end of step {engine.steps}"))
    if engine.steps == 1:
        engine.measuring.check_second_moments()
    return decision


def _count(engine: AdaptiveBatch, step: Step) -> None:
    """Take note that a step is over, applied or left out: from here on it cannot be undone."""
    engine._gradients.clear()
    step.finished, step.again = True, None
    engine.steps += 1
    engine.samples_drawn += step.global_batch_size
    engine._assembler.seek(engine.samples_drawn)


def _decide(engine: AdaptiveBatch, step: Step, loss: float, lr: float, seen: Seen, reason: str) -> Decision:
    """Ask the policy, apply the bounds, and write the record."""
    observation = Observation(
        gradient=seen.combined,
        global_batch_size=step.global_batch_size,
        samples_seen=engine.samples_seen,
        loss=loss,
        lr=lr,
        dataset_size=engine.dataset_size,
        loss_average=engine.measuring.averaging.loss(loss) if engine.parallel.meets else None,
    )
    answer = Answer(size=engine.global_batch_size)
    if step.global_batch_size < step.plan.global_batch_size:
        reason = "short batch"
    elif not engine.parallel.meets:
        reason = "local step"
    else:
        answer = decide(
            engine.policy,
            observation,
            current=engine.global_batch_size,
            bounds=engine.bounds,
            minimum=engine.min_batch_size,
            measurable=engine.measuring.smallest_batch,
            maximum=engine.max_batch_size,
        )
        engine.global_batch_size = answer.size
        reason = answer.reason or reason
        engine.nonfinite_requests += answer.requested is not None and not math.isfinite(answer.requested)
    decision = _record(engine, step, observation, answer, reason)
    _close_step(engine, "step", decision, threshold=engine.policy.threshold, own=seen.own)
    return decision


def _skip(engine: AdaptiveBatch, step: Step, loss: float) -> Decision:
    """Leave out the update of a step that is not finite, or stop there."""
    engine.measuring.instrument.discard()
    _count(engine, step)
    overflow = engine.scaling.is_overflow(loss, step.scale)
    if overflow:
        engine.scaling.move(finite=False)
    engine.skipped += 1
    engine._skipped_in_a_row += not overflow
    observation = Observation(
        global_batch_size=step.global_batch_size,
        samples_seen=engine.samples_seen,
        loss=loss,
        lr=engine.learning_rate.current,
        dataset_size=engine.dataset_size,
    )
    answer = Answer(size=engine.global_batch_size)
    reason = "skipped: overflow of the loss scale" if overflow else "skipped: non-finite"
    decision = _record(engine, step, observation, answer, reason)
    _close_step(engine, "skip", decision, threshold=None)
    if overflow:
        return decision
    what = f"loss {loss:g} and gradient of step {engine.steps} are not both finite"
    if engine.on_nonfinite == "stop":
        raise NonFiniteGradient(
            f"{what}: look for NaN or infinite numbers in the data, lower the learning rate, "
            'or pass on_nonfinite="skip" to leave such steps out'
        )
    if engine._skipped_in_a_row >= MAX_SKIPPED:
        before = f"as in the {MAX_SKIPPED - 1} before"
        raise NonFiniteGradient(
            f"{what}, {before}: look for NaN or infinite numbers in the data, or start again with a lower learning rate"
        )
    return decision


def _record(engine: AdaptiveBatch, step: Step, observation: Observation, answer: Answer, reason: str) -> Decision:
    low, high = answer.interval or (None, None)
    return Decision(
        step=engine.steps,
        samples_seen=engine.samples_seen,
        progress=engine.progress,
        observation=observation,
        requested=answer.requested,
        requested_low=low,
        requested_high=high,
        plan=step.plan,
        next_plan=make_plan(engine.global_batch_size, engine.micro_batch_size, engine.parallel.ranks.count),
        lr=math.nan if observation.lr is None else observation.lr,
        reason=reason,
    )


def _close_step(
    engine: AdaptiveBatch,
    kind: str,
    decision: Decision,
    *,
    threshold: float | None,
    own: GradientStatistics | None = None,
) -> None:
    """Stop the step's clock, write its line, and save if it is time."""
    engine.seconds += time.perf_counter() - engine._started
    if engine._log.path is not None:
        line = step_record(decision, samples_drawn=engine.samples_drawn, threshold=threshold, own=own)
        line.update(rate_fields(engine) | engine.parallel.log_fields() | engine.scaling.log_fields())
        line.update(times(engine))
        engine._log.write(kind, line)
    save_if_due(engine)
