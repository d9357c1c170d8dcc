"""What `Step.run` does: all micro-batches, and all of them again in smaller ones where memory runs out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from adadagrad.core.errors import OutOfMemory
from adadagrad.engine.planning import plan_again
from adadagrad.engine.replay import KeptBatch, LossFunction, Replay, loss_and_weight
from adadagrad.engine.retry import Snapshot, advice, is_out_of_memory

if TYPE_CHECKING:
    from adadagrad.engine.step import Step


class _OnAnotherRank(Exception):
    """Another rank has run out of memory, and the step begins again on all of them."""


def run(step: Step, loss_function: LossFunction) -> None:
    """Run a step's micro-batches; see `Step.run`.

    Args:
        step: A step that was not begun.
        loss_function: The user's.

    Raises:
        OutOfMemory: Memory ran out and the step cannot be repeated.
    """
    engine = step.engine
    snapshot = Snapshot(engine.changing, engine.device)
    kept: list[KeptBatch] | None = [] if engine.replay else None
    while _runs_out_of_memory(step, loss_function, kept):
        if not snapshot.complete:
            raise OutOfMemory(
                "the step ran out of memory, and a buffer that had never changed before has changed in it, so that it "
                f"cannot be repeated: {advice(_largest(step))}"
            )
        step.begin(*plan_again(engine, (_largest(step) + 1) // 2))
        snapshot.restore()
    if kept is not None:
        step.again = Replay(step, loss_function, kept, snapshot)


def meet(step: Step) -> None:
    """Find out, before the micro-batch that synchronises the ranks, whether another one has run out of memory.

    Args:
        step: The step, at this rank's last micro-batch.

    Raises:
        _OnAnotherRank: Another one has.
    """
    if _tells(step):
        (short,) = step.engine.parallel.ranks.sum(0.0)
        if short:
            raise _OnAnotherRank
    step.together = step.engine.parallel.ranks.count > 1 and step.engine.parallel.gradient != "local"


def _tells(step: Step) -> bool:
    """Return whether the ranks exchange a word before the last micro-batch; all of them think the same."""
    parallel = step.engine.parallel
    return parallel.ranks.count > 1 and parallel.gradient == "shared" and step.split.several


def _largest(step: Step) -> int:
    """Return how many examples a rank ran in one forward at most; the same on all ranks."""
    parts = 1 if step.engine.parallel.gradient == "local" else step.engine.parallel.ranks.count
    return min(step.engine.micro_batch_size, -(-step.global_batch_size // parts))


def _runs_out_of_memory(step: Step, loss_function: LossFunction, kept: list[KeptBatch] | None) -> bool:
    """Run all micro-batches; return whether the step must be repeated in smaller ones, on all ranks.

    Returning from here lets go of the failed micro-batch: the frames of the error hold its activations.

    Args:
        step: The step, begun anew.
        loss_function: The user's.
        kept: Where the micro-batches go, to be evaluated again; None to let them go.

    Returns:
        False where all micro-batches have run.

    Raises:
        OutOfMemory: Memory ran out for one example, or where other ranks may wait.
    """
    batches = iter(step)
    if kept is not None:
        kept.clear()
    try:
        for batch in batches:
            if kept is not None:
                kept.append(KeptBatch(batch))
            _run_one(step, loss_function(batch))
    except _OnAnotherRank:
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if _largest(step) <= 1:
            raise OutOfMemory(f"the step ran out of memory: {advice(1)}") from error
        if step.together or step.engine.parallel.gradient == "sharded":
            raise OutOfMemory(
                "the step ran out of memory where other ranks may wait for this one, so that it cannot be repeated: "
                f"{advice(_largest(step))}"
            ) from error
        if _tells(step):
            step.engine.parallel.ranks.sum(1.0)
        return True
    finally:
        batches.close()
    return False


def _run_one(step: Step, result: Tensor | tuple[Any, ...]) -> None:
    step.backward(*loss_and_weight(result))
