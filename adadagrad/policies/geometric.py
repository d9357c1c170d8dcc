"""A batch size that grows by a constant factor, each time the same number of examples has been seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adadagrad.core.checks import check_integer, check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Observation
from adadagrad.policies.base import AbstractPolicy


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
        (high)). Their settings: `adabatch` here, and `StagedBatch.smith`.
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

    @classmethod
    def adabatch(
        cls, start: int, dataset_size: int, every_epochs: int = 20, factor: float = 2.0, end: int | None = None
    ) -> GeometricBatch:
        r"""Return the schedule of AdaBatch: multiply the batch size every few epochs.

        .. math:: b \leftarrow r b, \quad \mathrm{lr} \leftarrow \gamma \, \mathrm{lr} \qquad \text{every } f
                  \text{ epochs}

        In code: r is `factor`, f `every_epochs`. Doubling b goes with gamma = 0.75 where a run at a fixed batch size
        would have decayed by 0.375 (from memory, unverified (medium)). That half belongs to the learning rate: give
        the run ``lr_schedule=StepSchedule(range(f * N, total, f * N), gamma=0.75)`` with N = `dataset_size` and total
        the budget in examples, or ``gamma=0.375`` for the run at a fixed size that it is compared with.

        Args:
            start: First size, >= 1 [examples].
            dataset_size: N, >= 1 [examples].
            every_epochs: f, >= 1 [passes through the data].
            factor: r, > 1, dimensionless.
            end: Largest size asked for [examples]; None for no limit but the cap of the run.

        Returns:
            The schedule, in examples seen.

        Raises:
            InvalidArgument: An argument is outside its range.

        Source: Devarakonda, Naumov, Garland (2017), "AdaBatch", arXiv 1712.02029: b x 2 and lr x 0.75 every 20 epochs
            (verified in a third-party summary); the rule with r and gamma (verified in NVlabs/AdaBatch at 64e0e78,
            adabatch_cifar.py, whose shipped run script passes other numbers than the paper).
        Differs from the paper: with a factor that is not whole, the code rounds down at every stage, and here the
            run rounds start * r^k up, once. The code can also multiply the accumulation count instead of b; here how
            a batch is split into micro-batches is the engine's affair.

        Example:
            >>> policy = GeometricBatch.adabatch(start=128, dataset_size=50_000)
            >>> policy
            GeometricBatch(start=128, factor=2.0, every_samples=1000000, end=None)
            >>> from adadagrad.rates import StepSchedule
            >>> schedule = StepSchedule(range(1_000_000, 5_000_000, 1_000_000), gamma=0.75)  # 100 epochs
            >>> [schedule(20 * 50_000 * k, 5_000_000) for k in range(3)]
            [1.0, 0.75, 0.5625]
        """
        check_integer(1, dataset_size=dataset_size, every_epochs=every_epochs)
        return cls(start=start, factor=factor, every_samples=every_epochs * dataset_size, end=end)
