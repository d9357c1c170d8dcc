"""The report's figures: what the batch size did, what accuracy it bought, and what the test saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adadagrad.report.band import READING, draw_band, has_band
from adadagrad.report.noise_plot import READING as NOISE_READING
from adadagrad.report.noise_plot import TITLE as NOISE_TITLE
from adadagrad.report.noise_plot import draw_noise, has_noise
from adadagrad.report.run import LogRow, Run, accuracy_metric, metric_title
from adadagrad.report.style import (
    INK,
    MARKERS,
    color_of,
    drawing,
    label_axis,
    legend_above,
    line_of,
    new_figure,
    svg_text,
)
from adadagrad.report.thinning import batch_size_steps, bins, thin


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One figure and how to read it.

    Args:
        name: A word that identifies it on the page.
        title: What it shows.
        reading: One or two sentences on how to read it.
        draw: Makes the matplotlib figure; call it inside `adadagrad.report.style.drawing`.
    """

    name: str
    title: str
    reading: str
    draw: Callable[[], Any]

    def svg(self) -> str:
        """Draw the figure as an SVG element that refers to nothing outside itself."""
        with drawing(self.name):
            return svg_text(self.draw(), self.name)


def plots(runs: Sequence[Run]) -> list[Plot]:
    """List the figures that these runs have data for.

    Args:
        runs: At least one run.

    Returns:
        The figures in the order of the page; one without data is left out.
    """
    found = []
    if any(run.steps for run in runs):
        found.append(
            Plot(
                name="batch-size",
                title="Batch size against samples",
                reading="A flat line is a constant batch. Where the line climbs, the policy asked for more examples "
                "per step: a test does so when it finds the gradient of the batch too noisy to trust."
                + (READING if any(has_band(run) for run in runs) else ""),
                draw=lambda: _batch_size(runs),
            )
        )
    if any(min(rates) < max(rates) for rates in _learning_rates(runs) if rates):
        found.append(
            Plot(
                name="learning-rate",
                title="Learning rate against samples",
                reading="The rate of the first parameter group, as the step used it: the one that was given, times the "
                "schedule, times the factor of the rule by which the rate follows the batch.",
                draw=lambda: _learning_rate(runs),
            )
        )
    metric = accuracy_metric(runs)
    if metric is not None:
        found.extend(_accuracy_plots(runs, metric))
    if any(_measured(run) for run in runs):
        found.append(
            Plot(
                name="test",
                title="The two sides of the test against samples",
                reading="Dots are what the test measured: for the norm test, the variance of the batch's gradient "
                "over its squared length, a number without unit. The line is their running median. A dot above the "
                "dashed threshold asks for a larger batch, which brings the next dots down; below it the batch stays. "
                "A batch that may grow no further is measured no more.",
                draw=lambda: _test_sides(runs),
            )
        )
    if any(has_noise(run) for run in runs):
        found.append(Plot(name="noise-scale", title=NOISE_TITLE, reading=NOISE_READING, draw=lambda: draw_noise(runs)))
    return found


def _accuracy_plots(runs: Sequence[Run], metric: str) -> list[Plot]:
    title = metric_title(metric)
    return [
        Plot(
            name="accuracy-samples",
            title=f"{title.capitalize()} against samples",
            reading="The same amount of data at the same place: a higher line learned more from each example. The "
            "vertical axis shows where the runs differ and does not begin at 0; what lies below it is cut off.",
            draw=lambda: _accuracy(runs, metric, "samples seen", lambda row: row.samples_seen, False),
        ),
        Plot(
            name="accuracy-steps",
            title=f"{title.capitalize()} against steps",
            reading="The same number of optimizer steps at the same place. Steps are what many machines cannot "
            "share out, so a line further left needs fewer rounds of communication.",
            draw=lambda: _accuracy(runs, metric, "optimizer steps", lambda row: row.step),
        ),
        Plot(
            name="accuracy-seconds",
            title=f"{title.capitalize()} against seconds",
            reading="Training time on this machine, measuring included, evaluation left out. A line further left is "
            "what a larger batch, or fewer steps, saved here.",
            draw=lambda: _accuracy(runs, metric, "training time [s]", lambda row: row.seconds),
        ),
    ]


def _batch_size(runs: Sequence[Run]) -> Any:
    figure, axes = new_figure()
    handles, sizes = [], []
    for place, run in enumerate(runs):
        samples, size = batch_size_steps(run)
        sizes.extend(size)
        handles += axes.step(samples, size, where="post", **_look(place, run))
    for place, run in enumerate(runs):
        draw_band(axes, run, color_of(place), min(sizes) / 2, 2 * max(sizes))
    label_axis(axes, "x", "samples seen")
    label_axis(axes, "y", "examples per step", spread=max(sizes) > 4 * min(sizes), base=2)
    legend_above(figure, handles)
    return figure


def _learning_rate(runs: Sequence[Run]) -> Any:
    figure, axes = new_figure()
    handles = []
    for place, run in enumerate(runs):
        points = [(float(step.samples_seen), step.lr) for step in run.steps if step.lr is not None]
        if points:
            handles += axes.plot(*zip(*thin(points, 500), strict=True), **_look(place, run))
    label_axis(axes, "x", "samples seen")
    label_axis(axes, "y", "learning rate")
    axes.set_ylim(bottom=0)
    legend_above(figure, handles)
    return figure


def _learning_rates(runs: Sequence[Run]) -> list[list[float]]:
    """The learning rates of each run's steps, where they were recorded."""
    return [[step.lr for step in run.steps if step.lr is not None] for run in runs]


def _accuracy(
    runs: Sequence[Run], metric: str, label: str, place_of: Callable[[LogRow], float], may_spread: bool = True
) -> Any:
    """Draw accuracy over one measure of cost; that axis is logarithmic where the runs' costs differ much."""
    figure, axes = new_figure()
    curves = [[(place_of(row), value) for row, value in run.series(metric)] for run in runs]
    ends = [curve[-1][0] for curve in curves if curve]
    spread = may_spread and max(ends) > 5 * min(ends) > 0
    late = [value for curve in curves for _, value in curve[len(curve) // 10 :]]
    margin = max(0.01, 0.06 * (max(late) - min(late)))
    lowest = max(0.0, min(late) - margin)
    handles = []
    for place, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        shown = [(x, value) for x, value in curve if x > 0 or not spread]
        if shown:
            few = {"marker": MARKERS[place % len(MARKERS)], "markersize": 3.5} if len(shown) <= 60 else {}
            handles += axes.plot(*zip(*shown, strict=True), **_look(place, run), **few)
    label_axis(axes, "x", label, spread=spread)
    if spread:
        axes.set_xlim(left=min(x for curve in curves for x, value in curve if x > 0 and value >= lowest) / 1.5)
    axes.set_ylabel(metric_title(metric))
    axes.set_ylim(lowest, min(1.0, max(late) + margin) + 0.002)
    legend_above(figure, handles)
    return figure


def _test_sides(runs: Sequence[Run]) -> Any:
    from matplotlib.lines import Line2D

    figure, axes = new_figure()
    handles = []
    for place, run in enumerate(runs):
        points = _measured(run)
        if not points:
            continue
        few = thin(points, 500)
        axes.plot(
            *zip(*few, strict=True), linestyle="none", marker="o", markersize=2.5, color=color_of(place), alpha=0.35
        )
        middle = bins(points, 60)
        handles += axes.plot([b.x for b in middle], [b.median for b in middle], **_look(place, run))
        limits = [(s.samples_seen, s.threshold) for s in run.steps if s.threshold is not None and s.threshold > 0]
        if limits:
            axes.plot(*zip(*thin(limits, 300), strict=True), linestyle="--", linewidth=1.4, color=color_of(place))
    handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1.4, label="threshold"))
    handles.append(Line2D([], [], color=INK, linestyle="none", marker="o", markersize=3, alpha=0.5, label="measured"))
    end = max(run.steps[-1].samples_seen for run in runs if run.steps)
    axes.set_xlim(-0.03 * end, 1.03 * end)
    label_axis(axes, "x", "samples seen")
    label_axis(axes, "y", "relative variance of gradient", spread=True)
    legend_above(figure, handles)
    return figure


def _measured(run: Run) -> list[tuple[float, float]]:
    """Samples and the left side of the test, where it was measured and can stand on a log axis; none without a test."""
    if all(step.threshold is None for step in run.steps):
        return []
    return [
        (step.samples_seen, step.relative_variance)
        for step in run.steps
        if step.relative_variance is not None and 0 < step.relative_variance < math.inf
    ]


def _look(place: int, run: Run) -> dict[str, Any]:
    return {"color": color_of(place), "linestyle": line_of(place), "label": run.name.lstrip("_") or "run"}
