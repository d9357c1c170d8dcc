"""Between the last backward and the optimizer: correct, check, measure and clip a step's gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adadagrad.core.records import GradientStatistics
from adadagrad.engine.agreement import agree

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch
    from adadagrad.engine.step import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a step has shown.

    Args:
        own: Its own statistics; None where it was not measured.
        combined: What the policy reads of it: the same, or combined with steps before; None where there is nothing yet.
    """

    own: GradientStatistics | None = None
    combined: GradientStatistics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What is known of a step before the optimizer makes it.

    Args:
        loss: Its mean loss.
        norm: The norm of its gradient, before clipping.
        lr: The learning rate of its first parameter group; a trainer may change it before the step is counted.
        seen: What it has shown.
        reason: Why it has shown nothing.
    """

    loss: float
    norm: float
    lr: float = math.nan
    seen: Seen = Seen()
    reason: str = "not measured"

    @property
    def finite(self) -> bool:
        """Whether the optimizer may make it."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def prepare_step(engine: AdaptiveBatch, step: Step) -> Prepared:
    """Correct, check, measure and clip the gradient of a complete step; called by `Step.prepare`.

    Args:
        engine: The engine.
        step: Its step, all micro-batches of which have had their backward.

    Returns:
        What was found.

    Raises:
        InvalidArgument: The step's weights add up to 0.
    """
    gradients = engine._gradients
    agreed = agree(engine, step, stop=engine.stop_requested, failure=engine.measuring.failure)
    engine.stop_agreed |= agreed.stop
    step.mean.refuse_weightless()
    gradients.correct(step.correction)
    prepared = Prepared(loss=step.loss, norm=gradients.norm(), lr=engine.learning_rate.current)
    if not prepared.finite:
        return prepared
    if step.measured:
        statistics, reason = engine.measuring.finish(
            step.global_batch_size,
            step.weight_sq_sum,
            step.correction / engine.parallel.ranks.count,
            agreed.failure,
        )
        seen = Seen()
        if statistics is not None:
            engine.learning_rate.measured(statistics)
            combined, reason = engine.measuring.combine(statistics)
            seen = Seen(own=statistics, combined=combined)
        prepared = replace(prepared, seen=seen, reason=reason, lr=engine.learning_rate.current)
    if engine.max_grad_norm is not None:
        gradients.clip(prepared.norm, engine.max_grad_norm)
    return prepared
