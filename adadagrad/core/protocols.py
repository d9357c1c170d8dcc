"""The small interfaces between layers: who must offer what, and nothing more."""

from __future__ import annotations

from typing import ClassVar, Protocol

from adadagrad.core.records import Observation
from adadagrad.core.reduction import CoordinateReduction


class BatchSizePolicy(Protocol):
    """Anything that answers "how many examples next?"; `adadagrad.policies.base.AbstractPolicy` is one."""

    needs: ClassVar[frozenset[str]]
    """Names of the `GradientStatistics` fields that it reads; empty for a schedule, which costs nothing."""

    monotone: ClassVar[bool]
    """Whether the batch may only grow under this policy, where `Bounds.monotone` is None."""

    @property
    def coordinate_reduction(self) -> CoordinateReduction | None:
        """How V_j / g_j^2 is reduced over coordinates; None for a policy that does not read that ratio."""
        ...

    @property
    def threshold(self) -> float | None:
        """Right side of the test: it passes where threshold * requested / b does not exceed it. None without one."""
        ...

    def required_batch_size(self, observation: Observation) -> float:
        """Return the batch size asked for, in examples, neither rounded nor bounded."""
        ...


class LearningRateSchedule(Protocol):
    """A function of progress that gives the factor on every parameter group's initial learning rate."""

    def __call__(self, samples_seen: float, total_samples: float) -> float:
        """Return the factor at `samples_seen` of `total_samples`; dimensionless, >= 0."""
        ...
