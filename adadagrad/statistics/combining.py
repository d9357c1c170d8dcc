"""From what a policy asks for (`AbstractPolicy.averaging`) to what does it."""

from __future__ import annotations

from typing import Literal

from adadagrad.core.errors import InvalidArgument
from adadagrad.statistics.combination import AbstractCombination
from adadagrad.statistics.epoch_sums import EpochSums
from adadagrad.statistics.running import RunningStatistics


def combination(averaging: float | Literal["epoch"] | None, dataset_size: int | None) -> AbstractCombination | None:
    """Return what combines statistics over steps, from nothing.

    Args:
        averaging: A decay in (0, 1) for a running average, ``"epoch"`` for sums over a pass through the data, or None
            for every step's own statistics.
        dataset_size: N, examples in the data set, which ``"epoch"`` needs.

    Returns:
        The combination; None where each step stands for itself.

    Raises:
        InvalidArgument: `averaging` is none of these, or ``"epoch"`` is asked for without a data set's size.

    Example:
        >>> combination(0.95, None).decay, combination("epoch", 1000).dataset_size, combination(None, None)
        (0.95, 1000, None)
    """
    if averaging is None:
        return None
    if averaging == "epoch":
        if dataset_size is None:
            raise InvalidArgument('averaging="epoch" needs the size of the data set: give dataset_size')
        return EpochSums(dataset_size)
    if isinstance(averaging, bool) or not isinstance(averaging, int | float):
        raise InvalidArgument(f'averaging must be a decay in (0, 1), "epoch" or None, got {averaging!r}')
    return RunningStatistics(averaging)
