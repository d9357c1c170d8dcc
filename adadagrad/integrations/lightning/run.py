"""A run of Lightning's loop: which micro-batch ends a step, what its loss weighs, where a checkpoint goes back to.

Lightning asks at every micro-batch whether the optimizer steps after it: whether ``batch_idx + 1`` can be divided by
`accumulate_grad_batches`, or the epoch ends. It zeroes the gradient before a micro-batch whose ``batch_idx`` can be
divided by it, and divides the loss by it. So one number, set before each micro-batch, gives the engine's answer at any
of them: ``batch_idx + 1`` where the step ends, ``batch_idx + 2`` where not. Neither divides ``batch_idx`` but in the
epoch's first micro-batch, so that no gradient is zeroed within a step, and the factor that `Run.factor` returns undoes
the division of the loss. A change takes effect at the next step, wherever that begins: it waits for no multiple.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor

from adadagrad.checkpoint import random_states
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Decision
from adadagrad.engine import AdaptiveBatch
from adadagrad.engine.saving import progress_state, with_random_states
from adadagrad.engine.step import Step
from adadagrad.integrations.lightning.module import FirstCall
from adadagrad.statistics.example_instrument import ExampleInstrument


@final
class Run:
    """An engine whose steps Lightning makes.

    Lightning may save in the middle of a step, whose gradient its checkpoint does not hold. What is kept then is the
    progress before the step: model and optimizer are those of that time, and the step is run again. Its random numbers
    are the same where a save was to be expected: where validation falls into the step, and in the first one after a
    start. (Buffers have seen the first micro-batches: the running statistics of BatchNorm.)

    Args:
        engine: The engine; its micro-batches are whole.
        validates: After how many micro-batches of an epoch Lightning validates, and perhaps saves; infinite for never.
        opened: Micro-batches that have been run, where Lightning counts those of all epochs for that; else None.
    """

    def __init__(self, engine: AdaptiveBatch, validates: float, opened: int | None = None) -> None:
        self.engine, self._validates, self._opened = engine, validates, opened
        self._steps: Iterator[Step] = iter(engine)
        self._step: Step | None = None
        self._first: FirstCall | None = None
        self._called = not engine.measuring.enabled  # or known to be
        self._before: dict[str, Any] = {}
        self._random: dict[str, Any] | None = None
        self._begun = False
        self._made = False  # by the optimizer, and not yet counted
        self._decision: Decision | None = None  # of a step that was counted before its turn
        self._again = 0  # micro-batches of the step in which training was stopped
        self._handle = engine.optimizer.register_step_post_hook(self._note)

    @property
    def over(self) -> bool:
        """Whether the budget of samples is used."""
        return self.engine.progress >= self.engine.total_samples

    @property
    def at_epoch_end(self) -> bool:
        """Whether no example of the epoch is left."""
        return self._step is None and self.engine.samples_drawn % self.engine.dataset_size == 0

    def next_micro_batch(self) -> Any:
        """Return the next micro-batch, of a new step where none is open."""
        if self._step is None:
            self._before = progress_state(self.engine, random=False)
            self._random = random_states() if self._may_save_within() else None
            self._step, self._begun = next(self._steps), True
        batch = self._step.open()
        if self._opened is not None:
            self._opened += 1
        if not self._called and self._step.measured and isinstance(self.engine.measuring.instrument, ExampleInstrument):
            self._first = FirstCall(self.engine.parallel.module)
        return batch

    def close(self) -> None:
        """End a micro-batch whose backward is over.

        Raises:
            InvalidArgument: It is measured, and the measured module was not called.
        """
        if self._first is not None:
            self._first.close(needed=True)
            self._first, self._called = None, True
        self.step.close()

    @property
    def step(self) -> Step:
        """The step at work.

        Raises:
            InvalidArgument: There is none, because the batch does not come from the callback's loader.
        """
        if self._step is None:
            raise InvalidArgument(
                "the training loader must be the callback's: trainer.fit(model, adaptive.loader(loader))"
            )
        return self._step

    def divisor(self, batch_idx: int) -> int:
        """Return what `accumulate_grad_batches` must be in a micro-batch.

        Args:
            batch_idx: Its number in the epoch, from 0.
        """
        return batch_idx + (1 if self.step.left == 0 else 2)

    def factor(self, mean: Tensor, weights: float | Tensor | None) -> Tensor:
        """Take in a micro-batch's mean loss.

        Args:
            mean: The mean loss, detached.
            weights: What it weighs in all, or one weight for each example (n,); None for equal weights.

        Returns:
            The derivative of the step's loss with respect to it.
        """
        leaf = mean.requires_grad_()
        loss = leaf if weights is None else leaf * float(torch.as_tensor(weights).sum())
        (factor,) = torch.autograd.grad(self.step.share(loss, weights), leaf)
        return factor

    def complete(self) -> Decision | None:
        """Count the step where the optimizer has made it; return its record, or None in the middle of one."""
        if self._decision is None and self.step.prepared is not None:
            self._count()
        decision, self._decision = self._decision, None
        return decision

    def end(self) -> None:
        """Write the log's last line where the budget is used, and give up a step in which training was stopped."""
        if self._first is not None:
            self._first.close(needed=False)
        if self._made:
            self._count()
        if self._step is not None:
            self._again = len(self._step.split.sizes) - self._step.left
        elif self.over:
            next(self._steps, None)
        self._steps, self._step = iter(()), None
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the engine's progress, and how many micro-batches must be run again from there; on every rank."""
        if self._made:  # in a callback that comes before ours
            self._count()
        if self._step is None and not self._again:
            return {"engine": self.engine.progress_state(), "again": 0}
        if self._random is None:
            warnings.warn(
                f"a checkpoint was made in the middle of step {self._before['steps'] + 1}: where it is resumed the "
                "step is run again, with other random numbers. To resume exactly, save with "
                "ModelCheckpoint(every_n_train_steps=...) or after validation",
                stacklevel=3,
            )
        again = self._again if self._step is None else len(self._step.split.sizes) - self._step.left
        return {"engine": with_random_states(self.engine, self._before, self._random), "again": again}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken.

        Args:
            state: What `state_dict` returned.
        """
        self.engine.load_progress_state(state["engine"])

    def _note(self, *arguments: Any) -> None:
        """Take note that the optimizer has stepped: whoever saves from now on saves a model that has made the step."""
        self._made = self._step is not None and self._step.prepared is not None

    def _count(self) -> None:
        self._made = False
        self._decision = self.step.complete()
        self._step = None

    def _may_save_within(self) -> bool:
        """Return whether a save is to be expected before the last micro-batch of the step that comes next."""
        unit = self.engine.micro_batch_size * self.engine.parallel.ranks.count
        count = math.ceil(self.engine.global_batch_size / unit)
        done = self.engine.samples_drawn % self.engine.dataset_size // unit if self._opened is None else self._opened
        validates = any(batch % self._validates == 0 for batch in range(done + 1, done + count))
        return count > 1 and (validates or not self._begun)


Weight = Callable[[Any], "float | Tensor"]
"""From a micro-batch to what its mean loss weighs: a number, or one for each example (n,)."""
