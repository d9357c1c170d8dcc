"""Where a learning rate schedule has fallen by a given factor, twice that factor, and so on: found by bisection."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import count

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import LearningRateSchedule

GRID = 1000
"""How many points of the budget are tried for the schedule's maximum."""

ROUNDING = 1e-9
"""Relative distance taken for rounding error: a schedule that multiplies by 0.1 twice is at 0.010000000000000002."""


def cuts(schedule: LearningRateSchedule, *, total_samples: int, factor: float) -> Iterator[int]:
    r"""Yield the first number of examples at which the schedule is at most 1/factor, 1/factor^2, ...

    .. math:: t_k = \min \{ t \ge t_0 : f(t) \le a^{-k} \}, \qquad k = 1, 2, \dots

    In code: f is `schedule`, a `factor`, and t_0 a place near the maximum of f, the best of `GRID` equally spaced
    ones, so that the small values of a warm-up do not count. From there on f is taken to fall; whether it does is not
    checked. Some thousand calls of the schedule, and twenty or so for each cut.

    Args:
        schedule: A function of (samples_seen, total_samples).
        total_samples: The budget, >= 1 [examples].
        factor: a, > 1, dimensionless.

    Yields:
        t_k in (0, total_samples) [examples], rising, not always strictly: a jump may pass several levels at once.
        Without end where the schedule reaches 0.

    Raises:
        InvalidArgument: The schedule never rises above 1/factor.

    Example:
        >>> def halves(samples_seen: float, total_samples: float) -> float:
        ...     return 0.5 ** (samples_seen // 100)
        >>> list(cuts(halves, total_samples=350, factor=2.0))
        [100, 200, 300]
    """
    top = max(range(0, total_samples, max(total_samples // GRID, 1)), key=lambda t: schedule(t, total_samples))
    highest = schedule(top, total_samples)
    if highest <= 1 / factor:
        raise InvalidArgument(
            f"schedule must rise above 1 / factor = {1 / factor:g} of the initial learning rate, got at most "
            f"{highest:g}: let it start from 1, or warm up to 1"
        )
    for k in count(1):
        cut = _first_at_most(factor**-k * (1 + ROUNDING), schedule, top, total_samples)
        if cut == total_samples:
            return
        yield cut


def _first_at_most(level: float, schedule: LearningRateSchedule, top: int, total_samples: int) -> int:
    """Return the first number of examples from `top` on at which the schedule is <= level; the budget if none is."""
    return bisect_left(range(total_samples), True, lo=top, key=lambda t: schedule(t, total_samples) <= level)
