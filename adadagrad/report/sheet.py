"""A page for what is no training run: sentences, tables, curves, pictures; self-contained as the report is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adadagrad.report.plots import Plot
from adadagrad.report.style import (
    DARK,
    LIGHT,
    color_of,
    drawing,
    label_axis,
    legend_above,
    line_of,
    new_figure,
    svg_text,
)
from adadagrad.report.table import Table
from adadagrad.report.template import render

Image = Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]
"""Rows of pixels: a grey value each, or three colours."""
COLUMNS = 8
"""Images in a row of a picture at most."""
FEW = 3
"""Images up to which they are drawn larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line in a chart.

    Args:
        label: In the legend.
        x: Places, rising.
        y: A value at each.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Small images side by side.

    Args:
        name: A word that identifies it on the page.
        title: What it shows.
        reading: How to read it.
        images: Caption and pixels of each, at least one; pixels within `limits`.
        limits: Values drawn as black and as white.
        signed: Draw blue below the middle of the limits and red above it, instead of grey; for one channel.
    """

    name: str
    title: str
    reading: str
    images: Sequence[tuple[str, Image]]
    limits: tuple[float, float] = (0.0, 1.0)
    signed: bool = False

    def svg(self) -> str:
        """Draw it as an SVG element that refers to nothing outside itself."""
        with drawing(self.name):
            return svg_text(self._draw(), self.name)

    def _draw(self) -> Any:
        from matplotlib.figure import Figure

        columns = min(COLUMNS, len(self.images))
        rows = -(-len(self.images) // columns)
        size = 1.1 if columns > FEW else 2.4
        figure = Figure(figsize=(max(6.4, size * columns), 1.23 * size * rows), layout="constrained")
        for place, (caption, pixels) in enumerate(self.images, start=1):
            axes = figure.add_subplot(rows, columns, place)
            low, high = self.limits
            if isinstance(pixels[0][0], Sequence):
                axes.imshow([[[(v - low) / (high - low) for v in cell] for cell in row] for row in pixels])  # type: ignore[union-attr]
            else:
                axes.imshow(pixels, cmap="RdBu_r" if self.signed else "gray", vmin=low, vmax=high)
            axes.set_title(caption, fontsize=8)
            axes.set_axis_off()
        return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """All that a page holds.

    Args:
        title: Its heading.
        sentences: What the reader should know first.
        tables: Heading and table, in order.
        figures: Charts and pictures, in order.
        settings: Shown at the end, folded.
    """

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[tuple[str, Table]] = ()
    figures: Sequence[Plot | Picture] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


def chart(
    name: str, title: str, reading: str, axes: tuple[str, str], curves: Sequence[Curve], *, spread: bool = False
) -> Plot:
    """Return a chart of curves.

    Args:
        name: A word that identifies it on the page.
        title: What it shows.
        reading: How to read it.
        axes: What is on x and on y, with units.
        curves: At least one.
        spread: Make y logarithmic.

    Returns:
        The chart.
    """

    def draw() -> Any:
        figure, plane = new_figure()
        handles = []
        for place, curve in enumerate(curves):
            style = {"color": color_of(place), "linestyle": line_of(place), "label": curve.label}
            handles += plane.plot(curve.x, curve.y, marker="o" if len(curve.x) == 1 else None, **style)
        label_axis(plane, "x", axes[0])
        label_axis(plane, "y", axes[1], spread=spread)
        if len(curves) > 1:
            legend_above(figure, handles)
        return figure

    return Plot(name=name, title=title, reading=reading, draw=draw)


def sheet_html(sheet: Sheet) -> str:
    """Write a page.

    Args:
        sheet: What it holds.

    Returns:
        The page: no script, nothing from outside; legible in light and dark.

    Raises:
        MissingExtra: jinja2 or matplotlib is not installed.
    """
    figures = [(figure, figure.svg()) for figure in sheet.figures]
    return render("sheet.html.j2", title=sheet.title, sheet=sheet, figures=figures, light=LIGHT, dark=DARK)


def write_sheet(sheet: Sheet, path: Path) -> Path:
    """Write a page to a file, in place of what was there.

    Args:
        sheet: What it holds.
        path: The HTML file, in a folder that exists.

    Returns:
        The path.
    """
    path.write_text(sheet_html(sheet), encoding="utf-8")
    return path
