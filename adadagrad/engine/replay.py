"""A step's batch at other parameters: evaluated again after its own backward, or displaced from the start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adadagrad.batching.trees import leaf_name, map_leaves
from adadagrad.core.errors import InvalidArgument, NonFiniteGradient, StepError
from adadagrad.core.optimizing import Extrapolating
from adadagrad.engine.mean_loss import MeanLoss, check_loss
from adadagrad.engine.retry import Snapshot

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch
    from adadagrad.engine.step import Step

LossFunction = Callable[[Any], Tensor | tuple[Tensor, float | Tensor]]
"""Takes a micro-batch; returns its mean loss, or (sum of losses, weight)."""


class ReplayNotFinite(NonFiniteGradient):
    """The batch of a step has a gradient that is not finite at the parameters where it was evaluated again."""


class KeptBatch:
    """A micro-batch that is to be evaluated again, which nobody may have changed until then.

    Taking an entry out of it is no change: every evaluation has lists and mappings of its own. Its tensors are not
    copied; writing to one is noticed by its version counter, unless it went through `.data` or NumPy.

    Args:
        batch: The micro-batch, before its loss is computed for the first time.
    """

    def __init__(self, batch: Any) -> None:
        self._versions: list[tuple[str, Tensor, int]] = []
        self._batch = map_leaves(self._note, (batch,))

    def again(self) -> Any:
        """Return the micro-batch as it was.

        Raises:
            StepError: A tensor of it has been written to.
        """
        for name, tensor, version in self._versions:
            if tensor._version != version:
                raise StepError(
                    f"{name} was changed in place when its loss was computed, so that it cannot be evaluated again as "
                    "it was: let the loss function compute a new tensor"
                )
        return map_leaves(lambda _, leaves: leaves[0], (self._batch,))

    def _note(self, path: tuple[str, ...], leaves: Sequence[Any]) -> Any:
        leaf = leaves[0]
        if isinstance(leaf, Tensor) and not leaf.is_inference():
            self._versions.append((leaf_name(path), leaf, leaf._version))
        return leaf


class Replay:
    """The closure of a step: its loss and gradient at whatever the parameters are, with the same random numbers.

    The first call, which an optimizer makes at the present parameters, evaluates nothing: the step's own gradient is
    there, corrected and clipped. Every other call clears it and runs the same micro-batches again, from the random
    states and buffers with which the step began, and leaves states and buffers as it found them: running statistics
    take in a batch once. Its gradient is corrected and clipped like the step's own.

    Args:
        step: The step, all micro-batches of which have had their backward.
        loss_function: The user's.
        batches: Its micro-batches.
        start: What random states and buffers were when it began.
    """

    def __init__(self, step: Step, loss_function: LossFunction, batches: Sequence[KeptBatch], start: Snapshot) -> None:
        self._step, self._loss_function, self._batches, self._start = step, loss_function, batches, start
        self._fresh = True

    def __call__(self) -> float:
        """Evaluate the loss, and its gradient into `.grad`.

        Returns:
            The mean loss over the step's examples.

        Raises:
            StepError: A buffer has changed in the step of which there is no copy, or a micro-batch has been changed.
            ReplayNotFinite: Loss or gradient is not finite.
        """
        if self._fresh:
            self._fresh = False
            return self._step.loss
        if not self._start.complete:
            raise StepError(
                "a large buffer has changed in this step for the first time, so that its batch cannot be evaluated "
                "again as it was: leave replay out, or change the buffer from the first step on"
            )
        engine = self._step.engine
        now = Snapshot(engine.changing, engine.device)
        self._start.restore()
        try:
            with torch.enable_grad():
                loss = self._evaluate(engine)
        finally:
            now.restore()
        return loss

    def _evaluate(self, engine: AdaptiveBatch) -> float:
        """Run all micro-batches, and return the loss."""
        step, parallel = self._step, engine.parallel
        engine._gradients.clear()
        mean = MeanLoss(step.mean.planned, step.mean.ranks)
        last = len(self._batches) - 1
        for index, batch in enumerate(self._batches):
            with parallel.micro_batch(last=index == last, measured=False):
                loss, weight = loss_and_weight(self._loss_function(batch.again()))
                check_loss(loss)
                engine.differentiate(mean.add(loss, step.split.sizes[index], weight))
        engine._gradients.scale(step.correction)
        total = mean.totals[0]
        if parallel.gradient != "local":
            total = parallel.ranks.sum(total)[0] / step.mean.ranks
        value, norm = total * step.correction, engine._gradients.norm()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise ReplayNotFinite(
                f"loss {value:g} and gradient of step {step.number} are not both finite where the optimizer evaluates "
                "its batch again: lower the learning rate"
            )
        if engine.max_grad_norm is not None:
            engine._gradients.clip(norm, engine.max_grad_norm)
        return value


def loss_and_weight(result: Tensor | tuple[Any, ...]) -> tuple[Any, Any]:
    """Part what a loss function has returned.

    Args:
        result: The mean loss, or (sum of losses, weight).

    Returns:
        The loss, and its weight or None.

    Raises:
        InvalidArgument: It is a tuple, but no pair.
    """
    if not isinstance(result, tuple):
        return result, None
    if len(result) != 2:
        raise InvalidArgument(
            f"loss_function must return the mean loss, or (loss_sum, weight), got {len(result)} values"
        )
    return result


def displaced(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Return a context in which the parameters are where the optimizer wants its gradient.

    Args:
        optimizer: Any; most want it at the parameters themselves.
    """
    return optimizer.extrapolated() if isinstance(optimizer, Extrapolating) else nullcontext()


def apply_update(engine: AdaptiveBatch, step: Step) -> None:
    """Let the optimizer step, with the step's closure where the engine replays.

    Args:
        engine: The engine; the gradient is ready.
        step: The step.

    Raises:
        StepError: The step was not run by `Step.run`, so that there is nothing to evaluate again.
    """
    if not engine.replay:
        engine.optimizer.step()
        return
    if step.again is None:
        raise StepError("replay=True evaluates the batch again: use step.run(loss_function), not a loop over the step")
    engine.optimizer.step(step.again)
