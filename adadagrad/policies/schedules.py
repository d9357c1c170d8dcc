"""Batch size schedules: the size as a function of the examples seen, without looking at any gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adadagrad.core.checks import check_integer, check_positive
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
        InvalidArgument: An argument is not an integer in its range, or end - start is not a multiple of increment.

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
            raise InvalidArgument(
                f"end - start must be a multiple of increment, got {self.end} - {self.start} and {self.increment}"
            )

    def required_batch_size(self, observation: Observation) -> float:
        """Return the size that the ramp has reached at `samples_seen`, in examples."""
        seen = min(observation.samples_seen, self.ramp_samples)
        increments = (self.end - self.start) // self.increment
        return float(self.start + self.increment * (increments * seen // self.ramp_samples))


@dataclass(frozen=True, slots=True)
class GeometricBatch(AbstractPolicy):
    r"""Multiply the batch size by a constant each time a fixed number of examples has been seen.

    .. math:: b = \min\left( b_0 \, c^{\lfloor t / E \rfloor},\; b_1 \right)

    In code: t is `samples_seen`, b_0 `start`, c `factor`, E `every_samples`, b_1 `end`.

    Use it in place of a learning rate that decays by 1/factor at the same moments. It knows nothing of the model
    and soon meets the cap. Costs nothing.

    Args:
        start: First size, >= 1 [examples].
        factor: Growth at each stage, > 1, dimensionless. Smaller grows more slowly.
        every_samples: Length of a stage, >= 1 [examples]. Smaller grows faster.
        end: Largest size asked for, >= start [examples]; None for no limit but the cap of the run.

    Raises:
        InvalidArgument: An argument is outside its range, or end < start.

    Source: Devarakonda, Naumov, Garland (2017), "AdaBatch", arXiv 1712.02029; Smith, Kindermans, Ying, Le (2018),
        "Don't Decay the Learning Rate, Increase the Batch Size", arXiv 1711.00489 (both from memory, unverified
        (high)).
    Differs from the papers: stages are counted in examples seen, not in epochs.

    Example:
        >>> policy = GeometricBatch(start=64, factor=2, every_samples=1000, end=200)
        >>> [policy.required_batch_size(Observation(samples_seen=t)) for t in (0, 999, 1000, 2000)]
        [64.0, 64.0, 128.0, 200.0]
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[bool] = False

    start: int
    factor: float
    every_samples: int
    end: int | None = None

    def __post_init__(self) -> None:
        check_integer(1, start=self.start, every_samples=self.every_samples)
        check_positive(factor=self.factor)
        if self.factor <= 1:
            raise InvalidArgument(f"factor must be > 1, got {self.factor}")
        if self.end is not None:
            check_integer(1, end=self.end)
            if self.end < self.start:
                raise InvalidArgument(f"end must be >= start, got end={self.end} and start={self.start}")

    def required_batch_size(self, observation: Observation) -> float:
        """Return the size of the stage that `samples_seen` lies in, in examples."""
        most = int(600 / math.log(self.factor))  # stages to about 1e260, so that the power cannot overflow
        size = self.start * float(self.factor) ** min(observation.samples_seen // self.every_samples, most)
        return size if self.end is None else min(size, float(self.end))
