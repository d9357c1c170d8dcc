"""`Step`: one optimizer step, from its first micro-batch to the decision on the next batch size."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adadagrad.core.errors import StepError
from adadagrad.core.records import BatchPlan, Decision
from adadagrad.engine.finishing import complete_step, finish_step
from adadagrad.engine.mean_loss import MeanLoss, check_loss
from adadagrad.engine.micro_batches import MicroBatches
from adadagrad.engine.planning import abandon
from adadagrad.engine.preparing import Prepared, prepare_step
from adadagrad.engine.replay import LossFunction, Replay
from adadagrad.engine.running import run
from adadagrad.engine.splitting import Split

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch


class Step:
    """One optimizer step of an `AdaptiveBatch`, over exactly its planned examples, of which each rank runs its part.

    Either ``step.run(loss_function)``, or ``for batch in step: step.backward(loss)``; then ``step.update()``.
    Made by iterating the engine, not by hand. Where somebody else's trainer has the loop, the backward and the
    optimizer's step, the same in smaller parts: `open`, `share` and `close` for each micro-batch; `prepare` before
    clipping, `complete` after the optimizer has stepped.

    Args:
        engine: The engine.
        number: The step's number, from 1.
        plan: Its plan.
        size: Examples in this step; below the plan's only where a run or an epoch ends.
        split: This rank's micro-batches of it.
    """

    def __init__(self, engine: AdaptiveBatch, number: int, plan: BatchPlan, size: int, split: Split) -> None:
        self.engine, self.number, self.global_batch_size = engine, number, size
        self.finished = False
        """Whether `update` has applied this step, or left it out."""
        self.again: Replay | None = None
        """Evaluates this step's batch again, where the engine replays; set by `run`."""
        self.undone = False
        """Whether the engine has given this step up: its gradient is gone, and its examples come again."""
        self.begin(plan, split)

    def begin(self, plan: BatchPlan, split: Split) -> None:
        """Begin from the first micro-batch, also again.

        Args:
            plan: The plan.
            split: This rank's micro-batches.
        """
        parallel = self.engine.parallel
        ranks = 1 if parallel.gradient == "local" else parallel.ranks.count
        size = sum(split.sizes) if parallel.gradient == "local" else self.global_batch_size
        self.plan, self.split = plan, split
        self.scale = self.engine.scaling.factor
        """By how much the step's losses are multiplied before their backward, until `update` takes it out again."""
        self.mean = MeanLoss(size / ranks if ranks > 1 else size, ranks)
        """The step's loss, as its micro-batches come."""
        self.together = False
        """Whether this rank is at the micro-batch in which the ranks synchronise, where others may wait for it."""
        self._loop: weakref.ref[Generator[Any, None, None]] | None = None  # which ends itself where nobody holds it
        self._micro = MicroBatches(len(split.sizes))
        self.prepared: Prepared | None = None
        """What `prepare` has found; None before."""

    @property
    def samples_seen(self) -> int:
        """Examples whose update has been applied before this step."""
        return self.engine.samples_seen

    @property
    def measured(self) -> bool:
        """Whether this step's noise is measured."""
        return self.split.measured > 0

    def __iter__(self) -> Generator[Any, None, None]:
        """Return the micro-batches; each must go through `backward` before the next one.

        Returns:
            An iterator over batches as the data set's collation makes them, on the model's device. Where one had no
            backward, it raises a `StepError`.

        Raises:
            StepError: The step was iterated before or is undone.
        """
        self._refuse_undone()
        if not self._micro.new or self._loop is not None:
            raise StepError("a step can be iterated once: use step.run(...) or one loop over the step, not both")
        loop = self._each()
        self._loop = weakref.ref(loop)
        return loop

    def undo(self) -> None:
        """Give the step up: leave every context that it is in, also where somebody holds on to its loop."""
        self.undone, self.again = True, None
        loop = None if self._loop is None else self._loop()
        if loop is not None:
            loop.close()
        self._micro.abort()

    def _each(self) -> Generator[Any, None, None]:
        """Yield the micro-batches, each in its contexts."""
        while self.left:
            batch = self.open()
            try:
                yield batch
            except BaseException:
                self._micro.abort()
                raise
            self.close()

    @property
    def left(self) -> int:
        """How many of this rank's micro-batches have not been opened."""
        return self._micro.left

    def open(self) -> Any:
        """Fetch the next micro-batch, and enter the contexts of its measurement and of the ranks' synchronisation.

        Returns:
            The batch as the data set's collation makes it, on the model's device.

        Raises:
            StepError: All micro-batches were opened, the latest one was not closed, or the step is undone.
        """
        self._refuse_undone()
        return self._micro.open(self)

    def close(self) -> None:
        """Leave the contexts of the micro-batch that was opened last, after the backward of its `share`.

        Raises:
            StepError: None is open, or it had no backward.
        """
        self._micro.close(self)

    def backward(self, loss: Tensor, weight: float | Tensor | None = None) -> None:
        """Backward one micro-batch's loss, scaled so that the step's gradient is the mean over its examples.

        Args:
            loss: The mean loss over the micro-batch's examples; with `weight`, the sum of weighted losses.
            weight: Total weight of this micro-batch, for example its number of tokens; or one weight per
                example (n,), which per-example statistics need where they differ.

        Raises:
            StepError: No micro-batch is waiting for a backward, or only some of a step's losses have weights.
            LossWithoutGradient: The loss does not require grad.
            InvalidArgument: The loss is not a scalar, or the weights have the wrong shape or are not positive.
        """
        share = self.share(loss, weight)
        self._micro.done -= 1
        self.engine.differentiate(share)
        self._micro.done += 1

    def share(self, loss: Tensor, weight: float | Tensor | None = None) -> Tensor:
        """Return what is to be differentiated instead of a micro-batch's loss; for who calls backward himself.

        Args:
            loss: As for `backward`.
            weight: Likewise.

        Returns:
            The micro-batch's share of the step's loss, under the provisional scale that `prepare` corrects.

        Raises:
            StepError: No micro-batch is waiting for a backward, or only some of a step's losses have weights.
            LossWithoutGradient: The loss does not require grad.
            InvalidArgument: The loss is not a scalar, or the weights have the wrong shape or are not positive.
        """
        rows = self._micro.rows
        if rows is None:
            raise StepError("no micro-batch is waiting: call step.backward(loss) inside the loop over the step")
        check_loss(loss)
        share = self.mean.add(loss, rows, weight)
        self._micro.taken()
        return share if self.scale == 1.0 else share * self.scale

    def run(self, loss_function: LossFunction) -> None:
        """Run forward and backward of all micro-batches.

        Where memory runs out, the step is repeated in micro-batches of half the size, which then stay: the same global
        batch, the same random numbers, one update.

        Args:
            loss_function: Takes a micro-batch and returns its mean loss, or ``(loss_sum, weight)``.

        Raises:
            StepError: The step was run or iterated before, or is undone.
            InvalidArgument: It returned a tuple that is no pair, or `backward` refuses what it returned.
            OutOfMemory: Memory ran out, and the step cannot be repeated in smaller micro-batches: one example is too
                much, or other ranks may wait for this one.
        """
        self._refuse_undone()
        if not self._micro.new or self._loop is not None:
            raise StepError("a step can be iterated once: use step.run(...) or one loop over the step, not both")
        run(self, loss_function)

    def update(self) -> Decision:
        """Finish the step: statistics, clipping, optimizer step, and the decision on the next batch size.

        Returns:
            What was seen and decided.

        Raises:
            StepError: Micro-batches are left, update was called before, or the step is undone.
            InvalidArgument: The step's weights add up to 0.
            NonFiniteGradient: The loss or gradient is not finite and ``on_nonfinite="stop"``.
            UncoveredParameter: The estimator that was asked for cannot count a parameter; the step is undone.
            BatchCoupledModule: The same, for a model that mixes examples.
        """
        self._refuse_incomplete("update")
        try:
            return finish_step(self.engine, self)
        except BaseException:
            abandon(self.engine, self)
            raise

    def prepare(self) -> Prepared:
        """Make the gradient ready for the optimizer: agree, correct, measure, clip; for who steps it himself.

        Where loss or gradient is not finite there is no gradient any more, so that the optimizer's step changes
        nothing.

        Returns:
            What was found; `finite` says whether there is a gradient.

        Raises:
            StepError: Micro-batches are left, it was called before, the step is undone, or the optimizer must be
                stepped by the engine: in local steps and with ``replay``.
            InvalidArgument: As for `update`.
            UncoveredParameter: Likewise.
            BatchCoupledModule: Likewise.
        """
        self._refuse_incomplete("prepare")
        if self.engine.replay or self.engine.parallel.gradient == "local":
            raise StepError("local steps and replay=True need the engine to step the optimizer: use step.update()")
        try:
            self.prepared = prepare_step(self.engine, self)
            if not self.prepared.finite:
                self.engine._gradients.clear()
        except BaseException:
            abandon(self.engine, self)
            raise
        return self.prepared

    def complete(self) -> Decision:
        """Count the step whose gradient was prepared and given to the optimizer, and decide the next batch size.

        Returns:
            What was seen and decided.

        Raises:
            StepError: `prepare` was not called, the step is over, or it is undone.
            NonFiniteGradient: The loss or gradient is not finite and ``on_nonfinite="stop"``.
        """
        self._refuse_undone()
        if self.prepared is None or self.finished:
            raise StepError("complete comes once, after step.prepare() and the optimizer's step")
        return complete_step(self.engine, self, self.prepared)

    @property
    def loss(self) -> float:
        """Mean loss over the step's examples (or weights); waits for the device."""
        return self.mean.value

    @property
    def weight_sq_sum(self) -> float | None:
        """Sum of the squared weights with which examples enter the gradient; None for equal weights."""
        return self.mean.weight_sq_sum

    @property
    def correction(self) -> float:
        """Factor from the scales of the backward to the mean over the examples, or over their weights."""
        return self.mean.correction if self.scale == 1.0 else self.mean.correction / self.scale

    def coefficients(self) -> float | Tensor:
        """Return the weights with which the examples of the latest micro-batch enter the gradient as it is built."""
        found = self.mean.coefficients()
        return found if self.scale == 1.0 else found * self.scale

    def _refuse_incomplete(self, what: str) -> None:
        if self.finished or self.prepared is not None:
            raise StepError(f"{what} was called twice on one step: one update for each step of the engine")
        self._refuse_undone()
        if not self._micro.complete:
            raise StepError(
                f"{len(self.split.sizes) - self._micro.done} of {len(self.split.sizes)} micro-batches are left: loop "
                f"over the whole step (no break), or use step.run(...), before {what}"
            )

    def _refuse_undone(self) -> None:
        if self.undone:
            raise StepError(
                "this step is undone, because its loop was left or its update failed: its examples come again in the "
                "next loop over the engine"
            )
