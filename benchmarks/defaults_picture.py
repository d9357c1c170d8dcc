"""Draw what benchmarks/defaults.py found: quality against steps, one panel for each task and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adadagrad.report.style import INK, color_of, drawing, label_axis, png_bytes

if TYPE_CHECKING:
    from benchmarks.defaults import Entry, Study

LOOKS = {"constant": ("o", 0), "paper": ("s", 1), "recommended": ("D", 2)}
"""Marker and colour of each method, by the first word of its name."""
NAMES = {"constant": "constant batches", "paper": "the paper's norm test, eta 0.5", "recommended": "recommended"}


def draw(found: Sequence[tuple[Study, Sequence[Entry]]]) -> bytes:
    """Draw every method's mean test metric and its spread against its steps.

    Up and left is better; a loss has its axis turned over. A short horizontal line is the best constant batch's mean,
    as far to the left as an eighth of its steps.

    Args:
        found: Studies with the entries of their methods; at least one.

    Returns:
        A PNG file's content.
    """
    tasks = list(dict.fromkeys(study.task.name for study, _ in found))
    optimizers = list(dict.fromkeys(study.optimizer for study, _ in found))
    with drawing("defaults"):
        from matplotlib.figure import Figure

        size = (2.6 * len(tasks) + 0.8, 2.3 * len(optimizers) + 0.8)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(optimizers), len(tasks), squeeze=False)
        for row in panels:
            for axes in row:
                axes.set_visible(False)
        for study, entries in found:
            row, column = optimizers.index(study.optimizer), tasks.index(study.task.name)
            axes = panels[row][column]
            axes.set_visible(True)
            _panel(axes, study, entries)
            axes.set_title(f"{study.task.name}, {study.optimizer}", fontsize=10)
            axes.set_xlabel("optimizer steps, log scale" if row == len(optimizers) - 1 else "", fontsize=8)
        shown = {handle.get_label(): handle for row in panels for axes in row for handle in axes.get_lines()}
        named = [shown[label] for label in NAMES.values() if label in shown]
        figure.legend(handles=named, loc="outside lower center", ncols=len(named), fontsize=9)
        return png_bytes(figure)


def _panel(axes: object, study: Study, entries: Sequence[Entry]) -> None:
    """Draw one task with one optimizer."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    for word, (marker, color) in LOOKS.items():
        chosen = sorted((e for e in entries if e.method.split()[0] == word), key=lambda e: e.mean("steps"))
        axes.errorbar(
            [entry.mean("steps") for entry in chosen],
            [entry.mean("metric") for entry in chosen],
            yerr=[entry.spread for entry in chosen],
            marker=marker,
            color=color_of(color),
            linewidth=1.0,
            markersize=5,
        )[0].set_label(NAMES[word])
    constants = [entry for entry in entries if entry.method.startswith("constant")]
    best = max(constants, key=lambda entry: entry.chosen_by)
    steps, level = best.mean("steps"), best.mean("metric")
    axes.hlines(level, steps / 8, steps, color=INK, linewidth=0.8, linestyle=":")
    label_axis(axes, "x", "", spread=True)
    axes.tick_params(labelsize=8)
    if not study.task.higher_is_better:
        axes.invert_yaxis()
    axes.set_ylabel(study.task.metric if study.task.higher_is_better else "loss (nats)", fontsize=8)
