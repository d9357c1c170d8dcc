"""Learning rate schedules as functions of the examples seen, so that a changing batch size does not bend them.

Each is called with the number of examples seen *before* an update and with the budget, and returns the factor that
multiplies the initial learning rate of every parameter group for that update. A warm-up starts from 0, as in the
reference (timlautk/AdAdaGrad, verified): the very first update then has factor 0 and moves nothing, and a step of
many examples uses the factor of its beginning. All are pure, and free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adadagrad.core.checks import check_at_least, check_fraction, check_integer, check_positive
from adadagrad.core.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class ConstantSchedule:
    """Keep the initial learning rate throughout.

    Source: none needed.

    Example:
        >>> ConstantSchedule()(500, 1000)
        1.0
    """

    def __call__(self, samples_seen: float, total_samples: float) -> float:
        """Return 1.0, wherever the run stands."""
        return 1.0


@dataclass(frozen=True, slots=True)
class CosineSchedule:
    r"""Warm up linearly from 0, then follow half a cosine down to a floor.

    .. math:: f(t) = t / W \;\text{for}\; t < W, \qquad
              f(t) = \phi + (1 - \phi) \tfrac{1}{2} \left(1 + \cos \pi \frac{t - W}{T - W}\right)
              \;\text{for}\; W \le t \le T

    In code: t is `samples_seen`, T `total_samples`, W `warmup_samples`, phi `floor`; f = floor beyond T.

    Use it where the budget is known in advance. Stopping early, or extending a finished run, leaves the learning
    rate at a value that the schedule did not mean.

    Args:
        warmup_samples: W, >= 0 and below the budget [examples]. 0 starts at the full learning rate. With more
            than 0 the first update has factor 0.
        floor: Factor at the end, between 0 and 1, dimensionless.

    Raises:
        InvalidArgument: warmup_samples < 0, or floor outside [0, 1].

    Source: Loshchilov, Hutter (2017), "SGDR", arXiv 1608.03983, eq. 5 (from memory, unverified (medium)), with the
        warm-up and floor of timlautk/AdAdaGrad (verified).
    Differs from the paper: one period, no restart.

    Example:
        >>> schedule = CosineSchedule(warmup_samples=100, floor=0.1)
        >>> [round(schedule(t, 1100), 3) for t in (0, 50, 100, 600, 1100, 2000)]
        [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """

    warmup_samples: float = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(0, warmup_samples=self.warmup_samples)
        check_fraction(floor=self.floor)

    def __call__(self, samples_seen: float, total_samples: float) -> float:
        """Return the factor for the update that starts at `samples_seen` of `total_samples`."""
        warmup, progress = _phases(samples_seen, total_samples, self.warmup_samples)
        return warmup * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True, slots=True)
class LinearSchedule:
    r"""Warm up linearly from 0, then fall linearly to a floor.

    .. math:: f(t) = t / W \;\text{for}\; t < W, \qquad
              f(t) = 1 - (1 - \phi) \frac{t - W}{T - W} \;\text{for}\; W \le t \le T

    In code: the letters of `CosineSchedule`; f = floor beyond T.

    Use it where the budget is known in advance; compared with the cosine it spends less of it at high rates.

    Args:
        warmup_samples: W, >= 0 and below the budget [examples]. With more than 0 the first update has factor 0.
        floor: Factor at the end, between 0 and 1, dimensionless.

    Raises:
        InvalidArgument: warmup_samples < 0, or floor outside [0, 1].

    Source: none needed; in use since long before deep learning.
    Differs: the released code of AdAdaGrad rises after its warm-up in this mode; here it falls.

    Example:
        >>> schedule = LinearSchedule(warmup_samples=100, floor=0.5)
        >>> [schedule(t, 1100) for t in (0, 50, 100, 600, 1100, 2000)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    """

    warmup_samples: float = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(0, warmup_samples=self.warmup_samples)
        check_fraction(floor=self.floor)

    def __call__(self, samples_seen: float, total_samples: float) -> float:
        """Return the factor for the update that starts at `samples_seen` of `total_samples`."""
        warmup, progress = _phases(samples_seen, total_samples, self.warmup_samples)
        return warmup * (1 - (1 - self.floor) * progress)


@dataclass(frozen=True, slots=True, init=False)
class StepSchedule:
    """Change the learning rate at given numbers of examples seen, and keep it in between.

    Use it to repeat a published recipe. The budget plays no part.

    Args:
        milestones: A mapping or pairs, examples seen (>= 0) to the factor on the *initial* learning rate (>= 0)
            that holds from there on; or, with `gamma`, the examples alone. The order does not matter.
        gamma: Multiplies the factor once at each milestone, > 0, dimensionless; None with explicit factors.

    Raises:
        InvalidArgument: A milestone is not an integer >= 0 or is given twice, a factor is negative, gamma <= 0, or
            gamma and the form of `milestones` do not fit.

    Source: none needed; `torch.optim.lr_scheduler.MultiStepLR` is the same in epochs.

    Example:
        >>> schedule = StepSchedule({1000: 0.1, 2000: 0.01})
        >>> [schedule(t, 3000) for t in (0, 999, 1000, 2500)]
        [1.0, 1.0, 0.1, 0.01]
        >>> StepSchedule([1000, 2000], gamma=0.5)
        StepSchedule(milestones=((1000, 0.5), (2000, 0.25)))
    """

    milestones: tuple[tuple[int, float], ...]
    """Pairs (examples seen, factor from there on), sorted."""

    def __init__(
        self,
        milestones: Mapping[int, float] | Iterable[tuple[int, float]] | Iterable[int],
        gamma: float | None = None,
    ) -> None:
        entries = list(milestones.items() if isinstance(milestones, Mapping) else milestones)
        if gamma is None:
            pairs = [_pair(entry) for entry in entries]
        else:
            check_positive(gamma=gamma)
            pairs = [(_plain(entry), gamma**count) for count, entry in enumerate(sorted(entries, key=_plain), 1)]
        for milestone, factor in pairs:
            check_integer(0, **{"a milestone in milestones": milestone})
            check_at_least(0, **{"a factor in milestones": factor})
        if len({milestone for milestone, _ in pairs}) < len(pairs):
            raise InvalidArgument(f"milestones must be different, got {[milestone for milestone, _ in pairs]}")
        object.__setattr__(self, "milestones", tuple(sorted(pairs)))

    def __call__(self, samples_seen: float, total_samples: float) -> float:
        """Return the factor of the last milestone that is <= `samples_seen`, 1.0 before the first."""
        passed = [factor for milestone, factor in self.milestones if milestone <= samples_seen]
        return passed[-1] if passed else 1.0


def _phases(samples_seen: float, total_samples: float, warmup_samples: float) -> tuple[float, float]:
    """Return the warm-up factor and the progress after the warm-up, both from 0 to 1."""
    check_at_least(0, samples_seen=samples_seen)
    check_positive(total_samples=total_samples)
    if warmup_samples >= total_samples:
        raise InvalidArgument(
            f"warmup_samples must be < total_samples, got warmup_samples={warmup_samples} and "
            f"total_samples={total_samples}: shorten the warm-up or train longer"
        )
    if samples_seen < warmup_samples:
        return samples_seen / warmup_samples, 0.0
    return 1.0, min((samples_seen - warmup_samples) / (total_samples - warmup_samples), 1.0)


def _pair(entry: object) -> tuple[int, float]:
    """Return an entry (samples, factor); a bare number means that gamma was forgotten."""
    if isinstance(entry, tuple | list) and len(entry) == 2:
        return entry[0], entry[1]
    raise InvalidArgument(f"gamma must be given where milestones hold no factors, got the milestone {entry!r}")


def _plain(entry: object) -> int:
    """Return an entry that is a bare number of examples; one with a factor needs no gamma."""
    if isinstance(entry, int):
        return entry
    raise InvalidArgument(f"gamma needs milestones that are integers without factors, got {entry!r}")
