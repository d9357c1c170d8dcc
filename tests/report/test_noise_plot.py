"""The plot of the noise scale: a point a stretch, arrows where there is only a lower end, nothing where none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adadagrad.report.noise_plot import draw_noise, has_noise
from adadagrad.report.plots import plots
from adadagrad.report.reader import read_runs
from adadagrad.report.run import Run
from adadagrad.report.style import drawing
from tests.report.logs import small_run, write
from tests.report.test_answers import watched

pytest.importorskip("matplotlib")


def axes_of(runs: list[Run]) -> Any:
    with drawing("noise"):
        return draw_noise(runs).axes[0]


def test_a_point_and_a_bar_for_each_stretch_beside_the_batch_size(tmp_path: Path) -> None:
    scales = [50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0]
    runs = read_runs([watched(tmp_path / "run", scales)])
    axes = axes_of(runs)
    points = axes.containers[0]
    x, y = points.lines[0].get_data()
    assert list(x) == [640 + 1280 * place for place in range(8)]
    assert list(y) == pytest.approx(scales, rel=0.1)
    assert len(points.lines[2][0].get_segments()) == 8
    sizes = [line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(size) for size in sizes] == [[64, 64]]
    assert (axes.get_yscale(), axes.get_ylabel(), axes.get_xlabel()) == ("log", "examples, log scale", "samples seen")
    low, high = axes.get_ylim()
    assert low < 50 < 400 < high


def test_where_only_a_lower_end_is_known_an_arrow_stands(tmp_path: Path) -> None:
    runs = read_runs([watched(tmp_path / "run", [50.0] * 4 + [1e6] * 4, wobble=0.2)])
    axes = axes_of(runs)
    known = len(axes.containers[0].lines[0].get_xdata())
    assert known >= 4
    assert len(axes.containers) == 1 + 8 - known
    assert known < 8


def test_it_is_on_the_page_for_any_run_with_enough_measured_steps(tmp_path: Path) -> None:
    text = watched(tmp_path / "train", [64.0] * 2).read_text().replace("Watch()", "NormTest(eta=0.5)")
    (tmp_path / "train" / "run.jsonl").write_text(text)
    few = watched(tmp_path / "few", [64.0], steps=9)
    runs = read_runs([tmp_path / "train", few, write(tmp_path / "none", small_run())])
    assert [has_noise(run) for run in runs] == [True, False, False]
    names = [plot.name for plot in plots(runs)]
    assert names[-1] == "noise-scale"
    assert "noise-scale" not in [plot.name for plot in plots(runs[1:])]
    assert len(axes_of(runs).containers) == 1
