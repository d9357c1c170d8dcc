"""What the ranks tell each other once a step's backward is over: one message, after which all know the same.

The mean loss and the weights are sums over ranks; a wish to stop, and a measurement that failed, count wherever they
come from. A checksum of what every rank believes the step to be is compared as well: ranks that have come apart
(another seed, another script, a policy that reads the clock) are found before the update that would hide it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adadagrad.core.errors import RanksDisagree, StepError
from adadagrad.engine.failure import Failure

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch
    from adadagrad.engine.step import Step


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks know.

    Args:
        stop: Whether the run is to end after this step, because a rank was told to.
        failure: How the step's measurement has failed, on the rank where it is worst.
    """

    stop: bool = False
    failure: Failure = Failure.NONE


def agree(engine: AdaptiveBatch, step: Step, *, stop: bool = False, failure: Failure = Failure.NONE) -> Agreement:
    """Settle the step's loss and weights over the ranks, and find out what the others know.

    Args:
        engine: The engine.
        step: Its step, all micro-batches of which have had their backward.
        stop: Whether this rank was told to stop.
        failure: How this rank's measurement has failed.

    Returns:
        What holds for all.

    Raises:
        RanksDisagree: The ranks are not at the same step with the same plan and learning rate.
        StepError: Some ranks gave weights with their losses, and others did not.
    """
    ranks = engine.parallel.ranks
    if ranks.count == 1:
        return Agreement(stop, failure)
    mark, mean = checksum(engine, step), step.mean
    loss, weights, squares, weighted, plain, marks, stops, failures = ranks.sum(
        *mean.totals, float(mean.weighted is True), float(mean.weighted is False), float(mark), stop, failure.count
    )
    if marks != ranks.count * mark:
        raise RanksDisagree(
            f"rank {ranks.index} is at step {step.number} with {step.global_batch_size} of {step.samples_seen} samples "
            f"and lr {engine.learning_rate.current:g}, and another rank is not: give every rank the same script, "
            "settings, data set and seed"
        )
    if weighted and plain:
        raise StepError("either every micro-batch of a step has a weight or none has, on all ranks")
    mean.settle(loss, weights, squares, weighted=weighted > 0)
    return Agreement(stops > 0, Failure.worst(failures))


def checksum(engine: AdaptiveBatch, step: Step) -> int:
    """Return 32 bits of what this rank believes: sums of them over ranks are exact in float64.

    Args:
        engine: The engine.
        step: Its step.
    """
    believed = (
        engine.steps,
        engine.samples_seen,
        engine.samples_drawn,
        engine.global_batch_size,
        step.global_batch_size,
        step.measured,
        engine.learning_rate.current,
        step.scale,
    )
    return zlib.crc32(repr(believed).encode())
