"""The band in the plot of batch sizes: between which sizes the policy's request lies, as far as its errors tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from adadagrad.report.run import Run
from adadagrad.report.thinning import bins

FEW = 60
"""Measured steps up to which each one is drawn; beyond them, the medians of about so many groups."""

READING = (
    " The light band is what the policy asked for, give or take its standard error: exact statistics would ask for "
    "more than its lower edge in nine of ten cases (or with the confidence that was set), and for less than its upper "
    "edge likewise. Where the error of the squared gradient was not measured (it is, where a confidence is set), the "
    "band shows the error of the variance alone and is much too narrow."
)
"""How to read it."""


def has_band(run: Run) -> bool:
    """Return whether a run's log holds any interval: not where the policy measures nothing, or no error is known."""
    return any(step.requested_low is not None for step in run.steps)


def band(run: Run, floor: float, roof: float) -> tuple[list[float], list[float], list[float]]:
    """Trace the interval of the requested batch size over samples.

    Args:
        run: The run.
        floor: What the plot shows least; the band is cut off there [examples].
        roof: What it shows most, also where the upper end is infinite.

    Returns:
        Samples, lower and upper edge; empty where the log has none.
    """
    rows = [
        (float(step.samples_seen), step.requested_low, step.requested_high)
        for step in run.steps
        if step.requested_low is not None and step.requested_high is not None
    ]
    rows = [row for row in rows if not (math.isnan(row[1]) or math.isnan(row[2]))]
    places = [x for x, _, _ in rows]
    low, high = [low for _, low, _ in rows], [high for _, _, high in rows]
    if len(rows) > FEW:
        middle = bins(list(zip(places, low, strict=True)), FEW)
        places, low = [b.x for b in middle], [b.median for b in middle]
        high = [b.median for b in bins([(x, high) for x, _, high in rows], FEW)]
    return places, _between(low, floor, roof), _between(high, floor, roof)


def draw_band(axes: Any, run: Run, color: str, floor: float, roof: float) -> None:
    """Fill the band of a run; nothing where it has none.

    Args:
        axes: Matplotlib's axes.
        run: The run.
        color: Of the run.
        floor: As for `band`.
        roof: As for `band`.
    """
    places, low, high = band(run, floor, roof)
    if places:
        axes.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)


def _between(values: Sequence[float], floor: float, roof: float) -> list[float]:
    return [min(max(value, floor), roof) for value in values]
