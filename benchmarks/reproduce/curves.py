"""Draw accuracy against steps and against seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adadagrad.report.style import color_of, drawing, label_axis, line_of, png_bytes

PANELS = (("optimizer steps", 1), ("CPU seconds", 2))
"""What is on x, and its place in a point of a curve."""


def draw(rows: Mapping[str, Sequence[dict[str, Any]]], title: str) -> bytes:
    """Draw every run's accuracy twice: against its steps on the left, its processor seconds on the right.

    A colour is a row, a line a seed. The vertical axis begins 0.1 below the worst final accuracy, so the first part of
    a curve may lie below it.

    Args:
        rows: By row, the runs as `tables.read` gives them; at least one.
        title: What was trained.

    Returns:
        A PNG file's content.
    """
    with drawing("curves"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for place, (name, runs) in enumerate(rows.items()):
            for run in runs:
                for axes, (_, x) in zip(panels, PANELS, strict=True):
                    axes.plot(
                        [point[x] for point in run["curve"]],
                        [point[-1] for point in run["curve"]],
                        color=color_of(place),
                        linestyle=line_of(place),
                        linewidth=1.2,
                        label=name if run is runs[0] else None,
                    )
        for axes, (label, _) in zip(panels, PANELS, strict=True):
            label_axis(axes, "x", label, spread=True)
            axes.xaxis.get_major_locator().set_params(subs=(1,))
        label_axis(panels[0], "y", "test accuracy")
        worst = min(run["accuracy"] for runs in rows.values() for run in runs)
        panels[0].set_ylim(bottom=max(0.0, worst - 0.1))
        figure.suptitle(title, fontsize=11)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        return png_bytes(figure)
