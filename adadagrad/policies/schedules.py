"""Batch size schedules: the size as a function of the examples seen, without looking at any gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Observation
from adadagrad.policies.base import AbstractPolicy


@dataclass(frozen=True, slots=True)
class ConstantBatch(AbstractPolicy):
    """Ask for the same batch size at every step: the baseline that every adaptive policy is compared with.

    Costs nothing: no gradient statistic is measured.

    Args:
        global_batch_size: The size, >= 1 [examples over all ranks]; None keeps the size of the step just taken,
            so that the run stays at the size it started with.

    Raises:
        InvalidArgument: global_batch_size is not an integer >= 1.

    Source: none needed.

    Example:
        >>> ConstantBatch().required_batch_size(Observation(global_batch_size=64))
        64.0
        >>> ConstantBatch(256).required_batch_size(Observation(global_batch_size=64))
        256.0
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[bool] = False

    global_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.global_batch_size is not None:
            check_integer(1, global_batch_size=self.global_batch_size)

    def required_batch_size(self, observation: Observation) -> float:
        """Return the constant, in examples.

        Args:
            observation: Read only where no size was given.

        Returns:
            The batch size [examples].

        Raises:
            InvalidArgument: No size was given, and the observation holds none.
        """
        size = self.global_batch_size or observation.global_batch_size
        if size is None:
            raise InvalidArgument(
                "ConstantBatch needs observation.global_batch_size, got None: give the policy a global_batch_size"
            )
        return float(size)


@dataclass(frozen=True, slots=True)
class LinearBatch(AbstractPolicy):
    r"""Grow the batch in equal steps, equally spaced in examples seen, up to a final size.

    .. math:: b = b_0 + \Delta \left\lfloor \frac{n t}{R} \right\rfloor \;\text{for}\; t < R,
              \qquad n = (b_1 - b_0)/\Delta

    In code: t is `samples_seen`, R `ramp_samples`, b_0 `start`, b_1 `end`, Delta `increment`; b = b_1 for t >= R.

    Use it as a warm-up of the batch size where no measurement is wanted, or beside a policy that measures.
    It knows nothing of the model: the same ramp may be too fast for one and too slow for another. Costs nothing.

    Args:
        start: First size, >= 1 [examples].
        end: Last size, >= start, a whole number of increments above it [examples].
        ramp_samples: Examples seen when `end` is reached, >= 1. Smaller is a steeper ramp.
        increment: Step from one size to the next, >= 1 [examples]. Larger means fewer different sizes.

    Raises:
        InvalidArgument: An argument is not an integer in its range, or increments do not lead from start to end.

    Source: Megatron-LM, ``--rampup-batch-size start increment samples`` of older versions (verified in
        num_microbatches_calculator.py at 00caa53).
    Differs: the final size is reached at t = R, not at the first t > R; the division is exact in integers.

    Example:
        >>> policy = LinearBatch(start=32, end=128, ramp_samples=3000, increment=32)
        >>> [policy.required_batch_size(Observation(samples_seen=t)) for t in (0, 999, 1000, 3000, 9000)]
        [32.0, 32.0, 64.0, 128.0, 128.0]
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[bool] = False

    start: int
    end: int
    ramp_samples: int
    increment: int = 1

    def __post_init__(self) -> None:
        check_integer(1, start=self.start, end=self.end, ramp_samples=self.ramp_samples, increment=self.increment)
        if self.end < self.start:
            raise InvalidArgument(
                f"end must be >= start, got end={self.end} and start={self.start}: "
                "a decreasing batch size can be given as a StagedBatch"
            )
        if (self.end - self.start) % self.increment:
            whole = self.end - (self.end - self.start) % self.increment
            raise InvalidArgument(
                "end must be reached from start in whole increments, "
                f"got end={self.end}, start={self.start} and increment={self.increment}: take end={whole}, or "
                f"end={whole + self.increment}"
            )

    def required_batch_size(self, observation: Observation) -> float:
        """Return the size that the ramp has reached at `samples_seen`, in examples."""
        seen = min(observation.samples_seen, self.ramp_samples)
        increments = (self.end - self.start) // self.increment
        return float(self.start + self.increment * (increments * seen // self.ramp_samples))
