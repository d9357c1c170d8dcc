"""`ExponentialAverage` at work: another instrument measures, and what it finds is averaged over steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from adadagrad.core.records import GradientStatistics
from adadagrad.statistics.base import AbstractInstrument, Coefficients
from adadagrad.statistics.planner import StepSize
from adadagrad.statistics.running import RunningStatistics


class AveragedInstrument(AbstractInstrument):
    """Hands everything on to another instrument, and puts what it measured into a running average.

    Args:
        inner: What measures.
        average: The average; a state taken from it before `finish` undoes that step when it is loaded again.
    """

    def __init__(self, inner: AbstractInstrument, average: RunningStatistics) -> None:
        self.inner, self.average = inner, average

    @property
    def innermost(self) -> AbstractInstrument:
        """The instrument that measures."""
        return self.inner.innermost

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent measuring; averaging takes none to speak of."""
        return self.inner.seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self.inner.seconds = value

    @property
    def failure(self) -> Exception | None:
        """Why the step in progress will have no statistics; see `AbstractInstrument.failure`."""
        return self.inner.failure

    @property
    def compiled(self) -> str:
        """How a compiled model runs; see `AbstractInstrument.compiled`."""
        return self.inner.compiled

    def micro_batch(
        self, num_examples: int | None = None, coefficients: Coefficients = None
    ) -> AbstractContextManager[None]:
        """Measure one micro-batch; see `AbstractInstrument.micro_batch`."""
        return self.inner.micro_batch(num_examples, coefficients)

    def close_group(self) -> None:
        """Say that the measured part of the step is over; see `AbstractInstrument.close_group`."""
        self.inner.close_group()

    def finish(
        self, num_examples: int | None = None, weight_sq_sum: float | None = None, scale: float = 1.0
    ) -> GradientStatistics:
        """Take the step into the average and return that; see `AbstractInstrument.finish`."""
        return self.average.update(self.inner.finish(num_examples, weight_sq_sum, scale), ())

    def discard(self) -> None:
        """Forget the step in progress; steps that are finished stay in the average."""
        self.inner.discard()

    def costs(self, step: StepSize, device: str) -> tuple[float, float]:
        """Return the modelled costs; see `AbstractInstrument.costs`."""
        return self.inner.costs(step, device)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the average, and what the inner instrument has learnt."""
        return {"average": self.average.state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; see `AbstractInstrument.load_state_dict`."""
        self.average.load_state_dict(state["average"])
        self.inner.load_state_dict(state["inner"])
