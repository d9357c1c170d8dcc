"""A batch size given stage by stage: as pairs, as the string of Megatron-LM, or by one of three published rules."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from adadagrad.core.checks import check_integer, check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import LearningRateSchedule
from adadagrad.core.records import Observation
from adadagrad.policies.base import AbstractPolicy
from adadagrad.policies.cuts import cuts
from adadagrad.policies.stages import Stages, read_stages


@dataclass(frozen=True, slots=True, init=False)
class StagedBatch(AbstractPolicy):
    """Ask for a size that changes when given numbers of examples have been seen.

    The size is that of the last stage whose threshold is <= `samples_seen`.

    Use it to repeat a schedule that somebody else has published, or as a baseline. Sizes may also fall. It knows
    nothing of the model. Costs nothing. `smith`, `seesaw` and `critical_batch` make the stages by a rule.

    Args:
        stages: A mapping or an iterable of pairs, threshold [examples seen] to size [examples]; or a string of
            entries ``"threshold:size"`` separated by blanks or commas, where both parts may be decimal and may end
            in K, M, B or T (1e3, 1e6, 1e9, 1e12, in either case). The order does not matter. One threshold must
            be 0, no two may be equal, and sizes must be >= 1.

    Raises:
        InvalidArgument: The string cannot be read, or the stages break one of the rules above.

    Source: Megatron-LM, ``--step-batch-size-schedule`` (syntax verified in NVIDIA/Megatron-LM at d98e8a6).
    Differs: thresholds are always examples. Where Megatron-LM has a sequence length configured they are tokens:
        divide them by that length. A number that is not whole ("1.2345K") is an error instead of being cut.

    Example:
        >>> policy = StagedBatch("0:256 1M:1024")
        >>> policy
        StagedBatch(stages=((0, 256), (1000000, 1024)))
        >>> policy == StagedBatch({0: 256, 1_000_000: 1024})
        True
        >>> [policy.required_batch_size(Observation(samples_seen=t)) for t in (0, 999_999, 1_000_000)]
        [256.0, 256.0, 1024.0]
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    monotone: ClassVar[bool] = False

    stages: Stages
    """Pairs (examples seen, size), sorted, the first at 0."""

    def __init__(self, stages: str | Mapping[int, int] | Iterable[tuple[int, int]]) -> None:
        object.__setattr__(self, "stages", read_stages(stages))

    def required_batch_size(self, observation: Observation) -> float:
        """Return the size of the stage that `samples_seen` lies in, in examples."""
        index = bisect_right(self.stages, observation.samples_seen, key=lambda stage: stage[0])
        return float(self.stages[max(index - 1, 0)][1])

    @classmethod
    def smith(cls, start: int, milestones: Iterable[int], *, factor: float, dataset_size: int) -> StagedBatch:
        r"""Return stages that grow the batch where another run would cut the learning rate.

        .. math:: \mathrm{lr} \leftarrow \mathrm{lr} / a \quad\text{becomes}\quad b \leftarrow a b
                  \quad\text{until}\quad b \approx N / 10

        In code: a is `factor`, N `dataset_size`. Either way the noise of a step, about lr N / b, falls by a; the larger
        batch needs fewer steps. A milestone at which b would exceed N / 10, and every later one, is left out: cut the
        learning rate there as before, as the example does. For SGD with or without momentum.

        Args:
            start: First size, >= 1 [examples].
            milestones: Where the learning rate would be divided by a, >= 1 and different [examples seen].
            factor: a, > 1, dimensionless.
            dataset_size: N, >= 1 [examples].

        Returns:
            The stages; sizes that are not whole are rounded to the nearest.

        Raises:
            InvalidArgument: An argument is outside its range, or a milestone is given twice.

        Source: Smith, Kindermans, Ying, Le (2018), "Don't Decay the Learning Rate, Increase the Batch Size", arXiv
            1711.00489 (lr N / b verified in the abstract; the limit N / 10 from memory, unverified (high)).
        Differs from the paper: raising the learning rate or the momentum with b is left to the user.

        Example:
            >>> cuts = [100_000, 200_000, 300_000]
            >>> policy = StagedBatch.smith(128, cuts, factor=5, dataset_size=50_000)
            >>> policy
            StagedBatch(stages=((0, 128), (100000, 640), (200000, 3200)))
            >>> from adadagrad.rates import StepSchedule
            >>> StepSchedule([cut for cut in cuts if cut not in dict(policy.stages)], gamma=1 / 5)
            StepSchedule(milestones=((300000, 0.2),))
        """
        check_integer(1, start=start, dataset_size=dataset_size)
        _check_growth(factor)
        milestones = list(milestones)
        for milestone in milestones:
            check_integer(1, **{"a milestone in milestones": milestone})
        stages = [(0, start)]
        for k, milestone in enumerate(sorted(milestones), 1):
            if 10 * start * factor**k > dataset_size:
                break
            stages.append((milestone, round(start * factor**k)))
        return cls(stages)

    @classmethod
    def seesaw(
        cls, schedule: LearningRateSchedule, *, start: int, total_samples: int, factor: float = 2.0
    ) -> StagedBatch:
        r"""Return stages that grow the batch by a where a schedule has cut the learning rate by a.

        .. math:: b = a^k \, b_0 \quad\text{from the first } t \text{ with}\quad f(t) \le a^{-k}

        In code: f is `schedule`, t `samples_seen` after the schedule's maximum, so that a warm-up does not count; a is
        `factor`, b_0 `start`. Train with ``rate=Seesaw(...)``, which multiplies the learning rate by (b / b_0)^(-1/2),
        not with f. A warm-up remains, as ``lr_schedule=LinearSchedule(warmup_samples=W, floor=1.0)``.

        Use it with Adam or normalised SGD while noise dominates; beyond the critical batch size it fails.

        Args:
            schedule: A function of (samples_seen, total_samples), such as `CosineSchedule()`, that may rise once and
                then falls; one that rises again is not followed. It is called some thousand times, here only.
            start: b_0, >= 1 [examples].
            total_samples: The budget of the run, >= 1 [examples]. No stage is larger than that.
            factor: a, > 1, dimensionless; 1.1 or 2 in the paper. Smaller follows the schedule more closely.

        Returns:
            The stages; sizes that are not whole are rounded to the nearest.

        Raises:
            InvalidArgument: An argument is outside its range, or the schedule never rises above 1/a.

        Source: Seesaw, arXiv 2510.14717 (verified in abstract and reviews; the full text was not read).
        Differs from the paper: not known.

        Example:
            >>> from adadagrad.rates import CosineSchedule
            >>> StagedBatch.seesaw(CosineSchedule(floor=0.2), start=64, total_samples=10_000)
            StagedBatch(stages=((0, 64), (5805, 128), (8392, 256)))
        """
        check_integer(1, start=start, total_samples=total_samples)
        _check_growth(factor)
        stages = {0: start}
        for k, cut in enumerate(cuts(schedule, total_samples=total_samples, factor=factor), 1):
            if start * factor**k > total_samples:
                break
            stages[cut] = round(start * factor**k)
        return cls(stages)

    @classmethod
    def critical_batch(cls, start: int, measured: Mapping[int, float]) -> StagedBatch:
        r"""Return stages that double the batch each time the critical batch size has passed twice its size.

        .. math:: b \leftarrow 2 b \quad\text{while}\quad b^* > 2 b

        In code: b* is what `measured` holds, b begins at `start`. Runs that branch off a checkpoint measure it, with
        batch k b and learning rate sqrt(k) lr (Adam; k lr for SGD) for 2 billion tokens, the loss L_k smoothed with
        0.5: b* = k b for the largest k with L_k <= L_k' + 0.01 for all smaller k'. Train with
        ``rate=SquareRootScaling()``, which multiplies the learning rate by sqrt(2) at each doubling.

        Args:
            start: First size, >= 1 [examples].
            measured: Examples seen (>= 0) to b* measured there, > 0 [examples]. A falling b* changes nothing.

        Returns:
            The stages.

        Raises:
            InvalidArgument: An argument is outside its range.

        Source: "Critical Batch Size Revisited", arXiv 2505.23971 (verified in the full text).
        Differs from the paper: one measurement may double more than once, where the size had fallen that far behind.

        Example:
            >>> StagedBatch.critical_batch(1024, {0: 1500, 40_000: 2100, 80_000: 3000, 120_000: 9000})
            StagedBatch(stages=((0, 1024), (40000, 2048), (120000, 8192)))
        """
        check_integer(1, start=start)
        for samples, critical in measured.items():
            check_integer(0, **{"a number of examples in measured": samples})
            check_positive(**{"a critical batch size in measured": critical})
        stages, size = {0: start}, start
        for samples, critical in sorted(measured.items()):
            while critical > 2 * size:
                size *= 2
                stages[samples] = size
        return cls(stages)


def _check_growth(factor: float) -> None:
    """Refuse a factor that does not grow the batch."""
    check_positive(factor=factor)
    if factor <= 1:
        raise InvalidArgument(f"factor must be > 1, got {factor}")
