"""Draw loss against samples, steps and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adadagrad.report.style import color_of, drawing, label_axis, line_of, png_bytes

PANELS = (("sequences", 0, False), ("optimizer steps", 1, True), ("CPU seconds", 2, False))
"""What is on x, its place in a point of a curve, and whether its scale is logarithmic."""


def draw(rows: Mapping[str, Sequence[dict[str, Any]]], title: str) -> bytes:
    """Draw every run's loss three times: against its samples, its steps and its processor seconds.

    A colour is a method, a line a seed.

    Args:
        rows: By method, the runs as `benchmarks.runs.train` gives them; at least one.
        title: What was trained.

    Returns:
        A PNG file's content.
    """
    with drawing("losses"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.6), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for place, (name, runs) in enumerate(rows.items()):
            style = {"color": color_of(place), "linestyle": line_of(place), "linewidth": 1.2}
            for run in runs:
                points = [point for point in run["curve"] if point[-1] is not None]
                for axes, (_, x, _) in zip(panels, PANELS, strict=True):
                    label = name if run is runs[0] else None
                    axes.plot([point[x] for point in points], [point[-1] for point in points], label=label, **style)
        for axes, (label, _, spread) in zip(panels, PANELS, strict=True):
            label_axis(axes, "x", label, spread=spread)
        label_axis(panels[0], "y", "loss, nats per character")
        figure.suptitle(title, fontsize=11)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        return png_bytes(figure)
