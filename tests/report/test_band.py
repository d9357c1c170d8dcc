"""The band beside the batch sizes: from the log, cut off where the plot ends, absent where the log has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adadagrad.report.band import FEW, READING, band, has_band
from adadagrad.report.plots import plots
from adadagrad.report.reader import read_runs
from adadagrad.report.run import Run
from adadagrad.report.style import drawing
from tests.report.logs import small_run, start, step, write

pytest.importorskip("matplotlib")


def run_with(tmp_path: Path, intervals: list[tuple[Any, Any]]) -> Run:
    rows = [
        step(number, 16 * number, 16, measured=True, requested_low=low, requested_high=high)
        for number, (low, high) in enumerate(intervals, start=1)
    ]
    (run,) = read_runs([write(tmp_path / "run", [start(), *rows])])
    return run


def test_edges_are_those_of_the_log_cut_off_at_the_plots_ends(tmp_path: Path) -> None:
    run = run_with(tmp_path, [(10.0, 20.0), (None, None), (1.0, "inf"), ("nan", "nan"), (5.0, 6.0)])
    assert band(run, floor=4.0, roof=32.0) == ([16.0, 48.0, 80.0], [10.0, 4.0, 5.0], [20.0, 32.0, 6.0])


def test_many_steps_become_medians(tmp_path: Path) -> None:
    run = run_with(tmp_path, [(float(n % 5), 10.0 + n % 5) for n in range(5 * FEW)])
    places, low, high = band(run, floor=0.0, roof=99.0)
    assert places == [16.0 * (5 * n + 3) for n in range(FEW)]
    assert (low, high) == ([2.0] * FEW, [12.0] * FEW)


@pytest.mark.parametrize("known", [True, False])
def test_the_figure_has_a_band_and_says_so_where_the_log_has_one(tmp_path: Path, known: bool) -> None:
    intervals = [(10.0, 20.0), (12.0, "inf")] if known else [(None, None)] * 2
    plot = plots([run_with(tmp_path, intervals)])[0]
    with drawing(plot.name):
        axes = plot.draw().axes[0]
    assert (READING in plot.reading) == known
    assert len(axes.collections) == known
    if known:
        vertices = axes.collections[0].get_paths()[0].vertices
        assert (vertices[:, 1].min(), vertices[:, 1].max()) == (10.0, 32.0)  # sizes are 16: shown up to twice that


def test_a_log_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    (run,) = read_runs([write(tmp_path / "run", small_run())])
    assert not has_band(run)
    assert band(run, 1.0, 99.0) == ([], [], [])
