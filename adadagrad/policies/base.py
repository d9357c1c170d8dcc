"""What every batch size policy offers: a record in, a number of examples out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from adadagrad.core.checks import check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Observation
from adadagrad.core.reduction import CoordinateReduction

MEASURED = frozenset({"grad_norm_sq", "variance_trace", "inner_product_variance", "coordinate_ratio"})
"""Fields of `GradientStatistics` that a policy may need: what is measured, and only where it is needed."""


class AbstractPolicy(ABC):
    """A rule that answers "how many examples should the next step average?".

    A policy is a frozen dataclass without state, and pure: the same observation gives the same answer in every
    process, so that all ranks agree without a message. It neither rounds nor bounds its answer, and it lets
    division by zero give infinity or NaN (`adadagrad.core.records.quotient` does, Python's ``/`` raises); what those
    mean is decided once, in `adadagrad.policies.bounds`.

    To add one: a file with the formula, and one row in ``tests/policies/cases.py``.

    Raises:
        InvalidArgument: A class derives from this one whose `needs` is missing or names what is not measured.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True, slots=True)
        ... class Double(AbstractPolicy):
        ...     needs: ClassVar[frozenset[str]] = frozenset()
        ...     def required_batch_size(self, observation: Observation) -> float:
        ...         return 2.0 * (observation.global_batch_size or 1)
        >>> Double().required_batch_size(Observation(global_batch_size=8))
        16.0
    """

    __slots__ = ()

    needs: ClassVar[frozenset[str]]
    """Which of `MEASURED` it reads; empty for a schedule, which costs nothing."""

    monotone: ClassVar[bool] = True
    """Whether the batch may only grow under this policy, where `Bounds.monotone` is None; schedules say False."""

    def __init_subclass__(cls) -> None:
        needs: object = getattr(cls, "needs", None)
        if not isinstance(needs, frozenset) or not needs <= MEASURED:
            known = ", ".join(sorted(MEASURED))
            raise InvalidArgument(
                f"{cls.__name__}.needs must be a frozenset of some of {known} (what is derived from them comes with "
                f"them), or an empty one for a schedule, got {needs!r}"
            )

    @property
    def coordinate_reduction(self) -> CoordinateReduction | None:
        """How V_j / g_j^2 is to be reduced over coordinates; None for a policy that does not read that ratio."""
        return None

    @property
    def threshold(self) -> float | None:
        """Right side of the test: it passes where threshold * requested / b does not exceed it. None without a test."""
        return None

    @property
    def averaging(self) -> float | Literal["epoch"] | None:
        """Over which steps the engine combines statistics before it asks this policy, which itself remembers nothing.

        None, the default, is the step's own statistics. A number in (0, 1) is the decay of an exponential average over
        measured steps, of the loss too. ``"epoch"`` gives the sums over one pass through the data, at its end.
        """
        return None

    @abstractmethod
    def required_batch_size(self, observation: Observation) -> float:
        """Return the batch size asked for, in examples, neither rounded nor bounded.

        A pure function: it is asked several times about one step, with V and s as they were measured and as far off as
        their standard errors let them be.

        Args:
            observation: What the step just taken has shown.

        Returns:
            A batch size in examples over all ranks; NaN or infinite where the formula has no finite value.
        """

    def measured(self, observation: Observation, *names: str) -> tuple[float, ...]:
        """Read gradient statistics by name, and say which one is missing.

        Args:
            observation: What the policy was given.
            *names: Fields or properties of `GradientStatistics`.

        Returns:
            The values in the order of `names`, in the units of the record.

        Raises:
            InvalidArgument: There is no measurement, or one of the fields is None.
        """
        policy = type(self).__name__
        gradient = observation.gradient
        if gradient is None:
            raise InvalidArgument(
                f"{policy} needs observation.gradient, got None: "
                f"measure {', '.join(sorted(self.needs))} in this step or do not ask the policy"
            )
        values: list[float] = []
        for name in names:
            value: float | None = getattr(gradient, name)
            if value is None:
                raise InvalidArgument(
                    f"{policy} needs observation.gradient.{name}, got None: use an estimator that measures it"
                )
            values.append(value)
        return tuple(values)


def check_averaging(averaging: float | None) -> None:
    """Require the decay of an exponential average, or None for each step by itself.

    Args:
        averaging: What a policy with a field of that name was given.

    Raises:
        InvalidArgument: It is neither None nor a number above 0 and below 1.
    """
    if averaging is None:
        return
    check_positive(averaging=averaging)
    if averaging >= 1:
        raise InvalidArgument(f"averaging must be < 1, or None for each step by itself, got {averaging!r}")
