"""How every figure looks: size, fonts, colours that the colour-blind tell apart, numbers on axes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from adadagrad.core.errors import MissingExtra

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9", "#b8860b")
"""Colours of the runs in order, after Okabe and Ito, readable on white."""

DARK = ("#5ab4f0", "#ff9250", "#35cf9f", "#e38fd0", "#a5dcff", "#eac04d")
"""The same hues, readable on a dark page."""

INK = "#222221"
GRID = "#d0d0d1"
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":")


def color_of(index: int) -> str:
    """Return the colour of the run at a place in the list; colours repeat after six runs."""
    return LIGHT[index % len(LIGHT)]


def line_of(index: int) -> str:
    """Return the line style of the run at a place in the list; it changes when the colours repeat."""
    return LINES[index // len(LIGHT) % len(LINES)]


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Draw in the report's style; matplotlib's global settings are as before afterwards.

    Args:
        salt: Any word; figures with different words have different identifiers inside.

    Yields:
        Nothing.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtra("matplotlib", "report") from error
    settings: Any = {
        "axes.edgecolor": INK,
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "font.size": 11,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context(settings):
        yield


def new_figure() -> tuple[Any, Any]:
    """Open an empty figure with one pair of axes, without pyplot and so without global state.

    Returns:
        The figure and its axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    return figure, figure.add_subplot()


def legend_above(figure: Any, handles: Sequence[Any]) -> None:
    """Put the legend above the axes, where it covers no data."""
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = max(1, min(len(handles), 70 // (longest + 8)))
    figure.legend(handles=list(handles), loc="outside upper center", ncols=columns, fontsize=11)


def label_axis(axes: Any, which: str, label: str, spread: bool = False, base: int = 10) -> None:
    """Label an axis and write its numbers shortly.

    Args:
        axes: Matplotlib's axes.
        which: ``"x"`` or ``"y"``.
        label: What is on it, with its unit.
        spread: Make it logarithmic, and say so.
        base: Of the logarithm's ticks.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    if spread:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=base)
        axis.set_major_locator(LogLocator(base=base, subs=(1, 2, 5) if base == 10 else (1,), numticks=12))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(compact))
    (axes.set_xlabel if which == "x" else axes.set_ylabel)(label + (", log scale" if spread else ""))


def compact(number: float, _position: object = None) -> str:
    """Write a number shortly, as matplotlib's formatter calls it.

    Args:
        number: At least 0.
        _position: The tick's place, unused.

    Returns:
        For example ``"64"``, ``"1,500"``, ``"60k"`` or ``"2M"``.

    Example:
        >>> compact(64), compact(1500), compact(60000), compact(2e6), compact(0.5)
        ('64', '1,500', '60k', '2M', '0.5')
    """
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= max(unit, 1e4):
            return f"{number / unit:.4g}{suffix}"
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def svg_text(figure: Any, name: str) -> str:
    """Render a figure as SVG to stand inside a page, its colours left to the page's light or dark theme.

    Args:
        figure: A matplotlib figure.
        name: Unique on the page; it prefixes the identifiers inside.

    Returns:
        One ``<svg>`` element that refers to nothing outside itself.
    """
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', svg, count=1)
    for place, color in enumerate(LIGHT):
        svg = svg.replace(color, f"var(--run-{place})")
    return svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)").strip()


def png_bytes(figure: Any) -> bytes:
    """Render a figure as a PNG on white, for documents that cannot hold SVG.

    Args:
        figure: A matplotlib figure.

    Returns:
        The file's content.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    return buffer.getvalue()
