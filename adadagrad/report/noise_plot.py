"""The plot of the noise scale over training, with error bars, beside the batch size that was used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from adadagrad.report.noise import Stretch, stretches
from adadagrad.report.run import Run
from adadagrad.report.style import INK, MARKERS, color_of, label_axis, legend_above, line_of, new_figure
from adadagrad.report.thinning import batch_size_steps

TITLE = "Noise scale against samples"

READING = (
    "The noise scale is the batch size at which the gradient and its noise are equally strong. Each point averages a "
    "stretch of the run, its bar is the 95 % interval; an arrow marks the least that the noise scale can be, where the "
    "gradient cannot be told from noise. The dashed line is the batch size. Far below the points a larger batch saves "
    "steps at hardly any more samples; far above them it wastes samples."
)
"""How to read it."""


def has_noise(run: Run) -> bool:
    """Return whether enough steps of a run were measured for at least one point."""
    return bool(_shown(stretches(run)))


def draw_noise(runs: Sequence[Run]) -> Any:
    """Draw the noise scale of each run that has enough measured steps, and its batch size.

    Args:
        runs: At least one of them with `has_noise`.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.lines import Line2D

    figure, axes = new_figure()
    handles, heights = [], []
    for place, run in enumerate(runs):
        parts = _shown(stretches(run))
        if not parts:
            continue
        color, marker = color_of(place), MARKERS[place % len(MARKERS)]
        ends = [part.noise.interval() for part in parts]
        middles = [sum(part.samples) / 2 for part in parts]
        known = [part.noise.is_known for part in parts]
        x = [x for x, is_known in zip(middles, known, strict=True) if is_known]
        y = [part.noise.value for part in parts if part.noise.is_known]
        sure = [end for end, is_known in zip(ends, known, strict=True) if is_known]
        bars = [
            [value - low for value, (low, _) in zip(y, sure, strict=True)],
            [high - value for value, (_, high) in zip(y, sure, strict=True)],
        ]
        axes.errorbar(x, y, yerr=bars, color=color, linestyle="none", marker=marker, markersize=4.5, capsize=3)
        axes.plot(x, y, color=color, linestyle=line_of(place), linewidth=1.2, alpha=0.5)
        least = [(x, low) for x, (low, high) in zip(middles, ends, strict=True) if math.isinf(high)]
        for x_least, low in least:
            axes.errorbar(x_least, low, yerr=0.35 * low, lolims=True, color=color, capsize=3)
        samples, sizes = batch_size_steps(run)
        axes.step(samples, sizes, where="post", color=color, linestyle="--", linewidth=1.2)
        heights += [*(end for pair in sure for end in pair), *(1.5 * low for _, low in least), *sizes]
        handles.append(Line2D([], [], color=color, marker=marker, markersize=4.5, label=run.name.lstrip("_") or "run"))
    handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1.2, label="batch size"))
    axes.set_xlim(left=0)
    label_axis(axes, "x", "samples seen")
    label_axis(axes, "y", "examples", spread=True)
    axes.set_ylim(min(heights) / 1.6, 1.6 * max(heights))
    legend_above(figure, handles)
    return figure


def _shown(parts: Sequence[Stretch]) -> list[Stretch]:
    """The stretches that can stand on a log axis: not those without noise, or with a gradient below any chance."""
    return [part for part in parts if 0 < part.noise.interval()[0] < math.inf]
