"""Fewer points with the same picture: a run of a million steps must not make a page of a million points."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from adadagrad.report.run import CUT, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Points whose x lie close together.

    Args:
        x: Their median x.
        median: Their median y.
    """

    x: float
    median: float


def batch_size_steps(run: Run, most: int = 2000) -> tuple[list[float], list[float]]:
    """Trace the batch size as a staircase over samples, with a point only where it changes.

    Args:
        run: The run.
        most: About how many changes to keep at most.

    Returns:
        Samples before each change and the size from there on, closed by the end of the run.
    """
    corners: list[tuple[float, float]] = []
    for step in run.steps:
        if not corners or corners[-1][1] != step.global_batch_size:
            corners.append((step.samples_seen - step.global_batch_size, step.global_batch_size))
    if len(corners) > 1 and run.steps[-1].reason == CUT and corners[-1][1] < corners[-2][1]:
        corners.pop()  # the budget cut the last step short: no decision, so not part of the trace
    kept = thin(corners, most)
    if corners:
        kept.append((float(run.steps[-1].samples_seen), corners[-1][1]))
    return [x for x, _ in kept], [y for _, y in kept]


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Keep about `most` points, evenly in order, the first among them.

    Args:
        points: In the order to draw.
        most: How many at most, about.

    Returns:
        The points kept.

    Example:
        >>> thin([(0, 1), (1, 2), (2, 3), (3, 4)], most=2)
        [(0, 1), (2, 3)]
    """
    stride = max(1, math.ceil(len(points) / most))
    return list(points[::stride])


def bins(points: Sequence[tuple[float, float]], count: int) -> list[Bin]:
    """Summarise points in bins of equally many points.

    Args:
        points: In order of x.
        count: How many bins at most; each holds at least five points where there are that many.

    Returns:
        The bins in order.
    """
    size = max(5, math.ceil(len(points) / count))
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [
        Bin(x=statistics.median(x for x, _ in group), median=statistics.median(y for _, y in group)) for group in groups
    ]
