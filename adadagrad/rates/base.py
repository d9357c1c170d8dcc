"""What every learning-rate rule offers: how large a step is in, a factor on the learning rate out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import RateState
from adadagrad.core.records import GradientStatistics
from adadagrad.core.step_scale import StepScale

MEASURED = frozenset({"grad_norm_sq", "variance_trace"})
"""Fields of `GradientStatistics` that a rule may need."""


class AbstractRate(ABC):
    """A rule that answers "which learning rate goes with this batch size?".

    The engine sets every parameter group's learning rate to its initial value, times the schedule's factor at the
    present progress, times this rule's factor: always from the initial value, never by repeated multiplication, so
    that growing a batch and shrinking it back restores the rate bit for bit.

    A rule is a frozen dataclass without state, and pure. What it remembers (the averages of `AdaScale`) is a mapping of
    plain numbers that the engine keeps, saves and hands back: `start` makes it, `observe` puts a measurement in before
    the update of the step that was measured, `advance` counts a step that has been applied. All three return a new
    mapping.

    To add one: a file with the formula, and one row in ``tests/rates/cases.py``.

    Raises:
        InvalidArgument: A class derives from this one whose `needs` names what is not measured.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, slots=True)
        ... class CubeRoot(AbstractRate):
        ...     base_batch_size: int | None = None
        ...     def factor(self, state: RateState, step: StepScale) -> float:
        ...         return step.scale ** (1 / 3)
        >>> round(CubeRoot().factor({}, StepScale(global_batch_size=512, base_batch_size=64)), 6)
        2.0
    """

    __slots__ = ()

    needs: ClassVar[frozenset[str]] = frozenset()
    """Which of `MEASURED` it reads; empty for a rule that costs nothing."""

    def __init_subclass__(cls) -> None:
        needs: object = cls.needs
        if not isinstance(needs, frozenset) or not needs <= MEASURED:
            known = ", ".join(sorted(MEASURED))
            raise InvalidArgument(f"{cls.__name__}.needs must be a frozenset of some of {known}, got {needs!r}")

    @property
    @abstractmethod
    def base_batch_size(self) -> int | None:
        """The size b_0 for which the optimizer's learning rate was chosen; None is the first batch size of the run."""

    @property
    def counts_progress(self) -> bool:
        """Whether `progress` is something else than the examples of the step."""
        return False

    def start(self) -> RateState:
        """Return what the rule remembers before the first step: plain numbers by name."""
        return {}

    def observe(self, state: RateState, statistics: GradientStatistics, step: StepScale) -> RateState:
        """Return the state once a step has been measured, before its update.

        Args:
            state: The state so far.
            statistics: What was measured in this very step.
            step: How large it is.

        Returns:
            The new state.
        """
        return state

    @abstractmethod
    def factor(self, state: RateState, step: StepScale) -> float:
        """Return the factor on the schedule's learning rate for a step.

        Args:
            state: The state, with this step's measurement if there was one.
            step: How large the step is, and where the run stands.

        Returns:
            A dimensionless number >= 0.
        """

    def progress(self, state: RateState, step: StepScale) -> float:
        """Return the progress that a step makes, which schedules and the end of training read.

        Args:
            state: As for `factor`.
            step: As for `factor`.

        Returns:
            Examples; here those of the step.
        """
        return float(step.global_batch_size)

    def advance(self, state: RateState, step: StepScale) -> RateState:
        """Return the state once a step has been applied, whether it was measured or not.

        Args:
            state: As for `factor`.
            step: As for `factor`.

        Returns:
            The new state.
        """
        return state
