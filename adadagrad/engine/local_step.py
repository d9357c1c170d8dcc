"""The end of a local step: a rank's own update, and what the ranks agree on where they meet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adadagrad.core.errors import NonFiniteGradient, RanksDisagree, StepError
from adadagrad.core.optimizing import Reevaluating
from adadagrad.core.records import GradientStatistics
from adadagrad.engine.agreement import checksum
from adadagrad.engine.failure import Failure
from adadagrad.engine.replay import ReplayNotFinite, apply_update

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch
    from adadagrad.engine.step import Step

MAX_LEFT_OUT = 50
"""Updates that every rank leaves out in a row, after which a run is stopped."""


@dataclass(slots=True)
class LeftOut:
    """What this rank has left out because its own gradient was not finite.

    Args:
        examples: Since the ranks met.
        updates: Likewise.
        in_a_row: Updates, without one between that was applied.
    """

    examples: int = 0
    updates: int = 0
    in_a_row: int = 0

    def note(self, examples: int, *, finite: bool) -> None:
        """Take note of a step.

        Args:
            examples: This rank's.
            finite: Whether its update is applied.
        """
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if not finite:
            self.examples += examples
            self.updates += 1


@dataclass(frozen=True, slots=True)
class Meeting:
    """What all ranks know of the round that ends with the present step.

    Args:
        loss: Mean loss of this step's examples, but for those of ranks whose update is left out.
        weight_sq_sum: Sum of the squared weights with which examples enter the mean over ranks; None for equal ones.
        failure: How the step's measurement has failed.
        examples: Examples of all updates that were left out in the round.
        updates: How many these were, over all ranks.
    """

    loss: float
    weight_sq_sum: float | None
    failure: Failure
    examples: int
    updates: int


@dataclass(frozen=True, slots=True)
class Late:
    """What all ranks know of updates that were left out after `meet`, which comes before them.

    Args:
        examples: Theirs.
        updates: How many, over all ranks.
        ends: Whether the run cannot go on.
    """

    examples: int = 0
    updates: int = 0
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Own:
    """This rank's part of a local step.

    Args:
        examples: Its examples.
        weight: What they weigh: their number, or their weights in sum; where it is 0 no update is made.
        finite: Whether its loss and gradient are finite.
    """

    examples: int
    weight: float
    finite: bool


def own_part(engine: AdaptiveBatch, step: Step) -> Own:
    """Correct this rank's gradient, and see whether it is finite.

    Args:
        engine: The engine.
        step: Its step, all micro-batches of which have had their backward.

    Returns:
        What the rank has to add.

    Raises:
        InvalidArgument: The step's weights add up to 0, and there is no other rank whose examples may have some.
    """
    if engine.parallel.ranks.count == 1:
        step.mean.refuse_weightless()
    engine._gradients.correct(step.correction)
    examples = sum(step.split.sizes)
    finite = math.isfinite(step.loss) and math.isfinite(engine._gradients.norm())
    weight = step.mean.totals[1] if step.mean.weighted else float(examples)
    if not (finite and engine.replay):  # else `apply` knows
        engine.left_out.note(examples, finite=finite)
    return Own(examples, weight if finite else 0.0, finite)


def meet(engine: AdaptiveBatch, step: Step, own: Own) -> Meeting:
    """Tell the others of this rank's round, and hear of theirs, in one message of 88 bytes.

    Args:
        engine: The engine, at the last step of a round.
        step: The step.
        own: This rank's part of it.

    Returns:
        What holds for all.

    Raises:
        RanksDisagree: The ranks are not at the same step with the same plan and learning rate.
        StepError: Some ranks gave weights with their losses, and others did not.
        NonFiniteGradient: An update was left out and ``on_nonfinite="stop"``, or all ranks leave out all of theirs.
    """
    ranks, mean, left = engine.parallel.ranks, step.mean, engine.left_out
    mark = checksum(engine, step)
    failure = engine.measuring.failure if own.finite else Failure.FAILED
    loss, weight, squares, weighted, plain, marks, stops, failures, examples, updates, stuck = ranks.sum(
        own.weight * step.loss if own.finite else 0.0,
        own.weight,
        mean.totals[2] if own.finite else 0.0,
        float(mean.weighted is True),
        float(mean.weighted is False),
        float(mark),
        engine.stop_requested,
        failure.count,
        left.examples,
        left.updates,
        left.in_a_row >= MAX_LEFT_OUT,
    )
    left.examples = left.updates = 0
    engine.stop_agreed |= stops > 0
    if marks != ranks.count * mark:
        raise RanksDisagree(
            f"rank {ranks.index} is at step {step.number} with {step.global_batch_size} of {step.samples_seen} samples "
            f"and lr {engine.learning_rate.current:g}, and another rank is not: give every rank the same script, "
            "settings and seed"
        )
    if weighted and plain:
        raise StepError("either every micro-batch of a step has a weight or none has, on all ranks")
    if updates and (engine.on_nonfinite == "stop" or stuck == ranks.count):
        raise NonFiniteGradient(what_is_not_finite(updates, f"step {step.number}"))
    return Meeting(
        loss / weight if weight else math.nan,
        squares / weight**2 if weighted and weight else None,
        Failure.worst(failures),
        int(examples),
        int(updates),
    )


def settle(engine: AdaptiveBatch) -> None:
    """Average the models and count what was left out in a round that the end of the run has cut short.

    Args:
        engine: The engine, after its last step.

    Raises:
        NonFiniteGradient: An update was left out and ``on_nonfinite="stop"``.
    """
    updates = 0.0
    if not engine.parallel.together:
        left = engine.left_out
        examples, updates = engine.parallel.ranks.sum(left.examples, left.updates)
        left.examples = left.updates = 0
        engine.samples_seen -= int(examples)
        engine.learning_rate.take_back(int(examples))
        engine.skipped += int(updates)
    engine.parallel.finish()
    if updates and engine.on_nonfinite == "stop":
        raise NonFiniteGradient(what_is_not_finite(updates, f"the end, after step {engine.steps},"))


def what_is_not_finite(updates: float, where: str) -> str:
    """Return the message of updates that were left out, and end a run.

    Args:
        updates: How many.
        where: Before which point of the run.
    """
    return (
        f"{updates:.0f} local updates before {where} had a loss or gradient that is not finite: look for NaN or "
        'infinite numbers in the data, lower the learning rate, or pass on_nonfinite="skip" to leave them out, which '
        f"ends after {MAX_LEFT_OUT} in a row on all ranks"
    )


def apply(engine: AdaptiveBatch, step: Step, own: Own) -> GradientStatistics | None:
    """Make this rank's update, unless it is left out, and average the models if the ranks meet.

    An update is left out, too, where the optimizer evaluates its batch again and finds a gradient that is not finite.

    Args:
        engine: The engine; its gradient is corrected and measured.
        step: The step.
        own: This rank's part of the step.

    Returns:
        What the drifts of a round say of the noise, where they are read.

    Raises:
        ReplayNotFinite: The same, of an optimizer that may have moved the parameters meanwhile.
    """
    applied = bool(own.weight)
    if applied:
        if engine.max_grad_norm is not None:
            engine._gradients.clip(engine._gradients.norm(), engine.max_grad_norm)
        try:
            apply_update(engine, step)
        except ReplayNotFinite:
            if not isinstance(engine.optimizer, Reevaluating):
                raise
            applied = False
        if engine.replay:
            engine.left_out.note(own.examples, finite=applied)
    return engine.parallel.after_update(own.examples if applied else 0, own.weight if applied else 0.0)


def meet_late(engine: AdaptiveBatch) -> Late:
    """Hear of updates that were left out since `meet`; one more message of 24 bytes, where the engine replays.

    Args:
        engine: The engine, after the last update of a round.

    Returns:
        What holds for all.
    """
    if not engine.replay:
        return Late()
    ranks, left = engine.parallel.ranks, engine.left_out
    examples, updates, stuck = ranks.sum(left.examples, left.updates, left.in_a_row >= MAX_LEFT_OUT)
    left.examples = left.updates = 0
    ends = updates > 0 and (engine.on_nonfinite == "stop" or stuck == ranks.count)
    return Late(int(examples), int(updates), ends)
