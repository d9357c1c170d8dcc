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
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Decision
from adadagrad.engine import AdaptiveBatch
from adadagrad.engine.step import Step
from adadagrad.integrations.lightning.module import FirstCall
from adadagrad.statistics.example_instrument import ExampleInstrument


@final
class Run:
    """An engine whose steps Lightning makes.

    Args:
        engine: The engine; its micro-batches are whole.
        validates: After how many micro-batches of an epoch Lightning validates, and perhaps saves; infinite for never.
    """

    def __init__(self, engine: AdaptiveBatch, validates: float) -> None:
        self.engine, self._validates = engine, validates
        self._steps: Iterator[Step] = iter(engine)
        self._step: Step | None = None
        self._done = 0  # micro-batches of the epoch
        self._first: FirstCall | None = None
        self._called = not engine.measuring.enabled  # or known to be
        self._before: dict[str, Any] | None = None  # the progress before a step in the middle of which is validated

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
            if self.at_epoch_end:
                self._done = 0
            self._before = self.engine.progress_state() if self._validates_within() else None
            self._step = next(self._steps)
        self._done += 1
        batch = self._step.open()
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
        if self.step.prepared is None:
            return None
        decision = self.step.complete()
        self._step = self._before = None
        return decision

    def end(self) -> None:
        """Write the log's last line where the budget is used, and give up a step in which training was stopped."""
        if self._first is not None:
            self._first.close(needed=False)
        if self._step is None and self.over:
            next(self._steps, None)
        self._steps, self._step = iter(()), None

    def state_dict(self) -> dict[str, Any]:
        """Return the engine's progress, and how many micro-batches must be run again from there; on every rank.

        Raises:
            InvalidArgument: A step is in progress, and nobody could know that a save would come.
        """
        if self._step is None:
            return {"engine": self.engine.progress_state(), "again": 0}
        if self._before is None:
            raise InvalidArgument(
                "a checkpoint was asked for in the middle of a step, whose gradient it would not hold: save with "
                "ModelCheckpoint(every_n_train_steps=...) or after validation, not by time"
            )
        return {"engine": self._before, "again": len(self._step.split.sizes) - self._step.left}

    def load_state_dict(self, state: dict[str, Any], done: int) -> None:
        """Continue where a state was taken.

        Args:
            state: What `state_dict` returned.
            done: Micro-batches of the epoch before the step that comes next.
        """
        self.engine.load_progress_state(state["engine"])
        self._done = done

    def _validates_within(self) -> bool:
        """Return whether Lightning may validate before the last micro-batch of the step that comes next."""
        unit = self.engine.micro_batch_size * self.engine.parallel.ranks.count
        last = self._done + math.ceil(self.engine.global_batch_size / unit)
        return any(batch % self._validates == 0 for batch in range(self._done + 1, last))


Weight = Callable[[Any], "float | Tensor"]
"""From a micro-batch to what its mean loss weighs: a number, or one for each example (n,)."""
