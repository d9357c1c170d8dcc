"""A step's micro-batches, opened one after the other, each in the contexts that its forward and backward run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from adadagrad.core.errors import StepError
from adadagrad.engine.delivering import micro_batches
from adadagrad.engine.replay import displaced
from adadagrad.engine.running import meet

if TYPE_CHECKING:
    from adadagrad.engine.step import Step


class MicroBatches:
    """Where a step is in its micro-batches. It does not hold the step, which would then outlive its last use.

    Args:
        count: How many micro-batches there are.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._state: Literal["new", "open", "between", "complete"] = "new"
        self._opened = 0
        self.done = 0
        """How many had their backward."""
        self._rows: int | None = None
        self._batches: Iterator[Any] = iter(())
        self._inside, self._around = ExitStack(), ExitStack()  # contexts of one micro-batch, and of all of them

    @property
    def new(self) -> bool:
        """Whether none was opened."""
        return self._state == "new"

    @property
    def complete(self) -> bool:
        """Whether all were closed."""
        return self._state == "complete"

    @property
    def left(self) -> int:
        """How many have not been opened."""
        return self._count - self._opened

    @property
    def rows(self) -> int | None:
        """Examples of the micro-batch that waits for its backward, 0 where it counts nothing; None where none waits."""
        return self._rows if self._state == "open" else None

    def taken(self) -> None:
        """Take note that the open micro-batch's loss has been taken in."""
        self._rows = None
        self.done += 1

    def open(self, step: Step) -> Any:
        """Fetch the next micro-batch and enter its contexts; see `Step.open`.

        Args:
            step: The step.

        Returns:
            The batch.

        Raises:
            StepError: All were opened, or the latest one was not closed.
        """
        index, sizes, engine = self._opened, step.split.sizes, step.engine
        if self._state in ("open", "complete"):
            raise StepError("no micro-batch can be opened: close the latest one, and open as many as step.left says")
        instrument, parallel = engine.measuring.instrument, engine.parallel
        try:
            if index == 0:
                self._batches = micro_batches(engine, sizes)
                self._around.enter_context(displaced(engine.optimizer))
            batch = next(self._batches)
            rows = self._rows = sizes[index]
            last, measured = index + 1 == len(sizes), index < step.split.measured
            if last:
                meet(step)
            if measured and (rows or parallel.aligned):
                self._inside.enter_context(instrument.micro_batch(max(rows, 1), step.coefficients))
            self._inside.enter_context(parallel.micro_batch(last=last, measured=measured))
        except BaseException:
            self.abort()
            raise
        self._opened, self._state = index + 1, "open"
        return batch

    def close(self, step: Step) -> None:
        """Leave the contexts of the open micro-batch; see `Step.close`.

        Args:
            step: The step.

        Raises:
            StepError: None is open, or it had no backward.
        """
        if self._state != "open":
            raise StepError("no micro-batch is open: call step.open() before step.close()")
        self._inside.close()
        self._state = "between"
        if self.done != self._opened:
            raise StepError(
                f"micro-batch {self._opened} of {self._count} had no backward: call step.backward(loss) once for "
                "each batch that the step yields"
            )
        if self._opened == step.split.measured < self._count:
            step.engine.measuring.instrument.close_group()
        if not self.left:
            self._around.close()
            self._state = "complete"

    def abort(self) -> None:
        """Leave every context as an error would."""
        gone = GeneratorExit()
        self._inside.__exit__(GeneratorExit, gone, None)
        self._around.__exit__(GeneratorExit, gone, None)
