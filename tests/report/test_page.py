"""The page stands alone, says what the table says, and lets nothing from a log become markup."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from adadagrad.core.errors import MissingExtra
from adadagrad.report.page import report_html, write_report
from adadagrad.report.plots import plots
from adadagrad.report.reader import read_runs
from adadagrad.report.run import CUT, Run
from adadagrad.report.style import LIGHT, drawing, png_bytes
from adadagrad.report.thinning import batch_size_steps, bins
from tests.report.logs import end, log, long_run, small_run, start, step, write

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    write(tmp_path / "constant-16", long_run(16, total=20_000))
    write(tmp_path / "constant-512", long_run(512, total=20_000))
    write(tmp_path / "norm", long_run(16, total=20_000, eta=0.5))
    (tmp_path / "norm" / "config.toml").write_text('[policy]\neta = 0.5 # "<&>"\n')
    return read_runs([tmp_path / name for name in ("constant-16", "constant-512", "norm")])


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.identifiers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                self.references.append(value or "")
            if name == "id":
                self.identifiers.append(value or "")


def test_page_refers_to_nothing_outside_itself(runs: list[Run]) -> None:
    text = report_html(runs)
    assert not re.search(r"https?:|//[a-z]|@import", text)
    page = _Page(text)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    targets = {f"#{identifier}" for identifier in page.identifiers}
    assert set(page.references) <= targets
    assert set(re.findall(r"url\((#[^)]*)\)", text)) <= targets
    assert len(page.identifiers) == len(set(page.identifiers))


def test_page_holds_table_figures_readings_and_settings(runs: list[Run]) -> None:
    text = report_html(runs, title="Three ways")
    assert "<title>Three ways</title>" in text
    assert text.count("<svg") == text.count("<figcaption>") == 5
    for word in ("constant-16", "constant-512", "norm", "best validation accuracy", "NormTest(eta=0.5)"):
        assert word in text
    assert text.count("<details>") == 3
    assert "eta = 0.5 # &#34;&lt;&amp;&gt;&#34;" in text
    assert "prefers-color-scheme: dark" in text
    assert "var(--run-2)" in text
    assert text.count(LIGHT[0]) == 1  # as the value of a variable, never in a figure


def test_page_says_what_the_runs_share_and_nothing_else(tmp_path: Path, runs: list[Run]) -> None:
    facts = "100 training examples, 10 parameters, optimizer Adagrad, a budget of 20,000 samples, seed 0."
    assert f"Same in all runs: {facts}" in report_html(runs)
    write(tmp_path / "other", [start(seed=3, parameters="many"), *small_run()[1:]])
    text = report_html(read_runs([tmp_path / "norm", tmp_path / "other"]))
    assert "Same in all runs: 100 training examples, optimizer Adagrad." in text
    write(tmp_path / "bare", [{"kind": "start"}])
    assert "Same in" not in report_html(read_runs([tmp_path / "bare"]))


def test_page_names_model_and_data_where_all_configurations_agree(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, small_run()) for name in "ab"]
    config = '[problem]\ndata = "digits"\nmodel = "{}"\n'
    for path in paths:
        path.with_name("config.toml").write_text(config.format("mlp"))
    assert "Same in all runs: mlp on digits, 100 training examples" in report_html(read_runs(paths))
    for other in (config.format("cnn"), "[problem]\n", "problem = 3\n", "not toml", ""):
        paths[1].with_name("config.toml").write_text(other)
        assert "Same in all runs: 100 training examples" in report_html(read_runs(paths))


@pytest.mark.parametrize(("runs_measured", "lone"), [(True, True), (False, False)])
def test_a_last_figure_without_a_neighbour_has_the_row_to_itself(
    tmp_path: Path, runs_measured: bool, lone: bool
) -> None:
    write(tmp_path / "run", long_run(16, total=5_000, eta=0.5 if runs_measured else None))
    assert ('class="figures lone"' in report_html(read_runs([tmp_path / "run"]))) == lone


def test_figures_say_what_is_on_their_axes(runs: list[Run]) -> None:
    labels = {}
    for plot in plots(runs):
        with drawing(plot.name):
            axes = plot.draw().axes[0]
        labels[plot.name] = (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale())
    assert labels == {
        "batch-size": ("samples seen", "examples per step, log scale", "log"),
        "accuracy-samples": ("samples seen", "validation accuracy", "linear"),
        "accuracy-steps": ("optimizer steps, log scale", "validation accuracy", "linear"),
        "accuracy-seconds": ("training time [s], log scale", "validation accuracy", "linear"),
        "test": ("samples seen", "relative variance of gradient, log scale", "log"),
    }


def test_a_policy_without_a_threshold_has_no_two_sides(tmp_path: Path) -> None:
    records = [record | {"threshold": None} if record["kind"] == "step" else record for record in small_run()]
    write(tmp_path / "noise-scale", records)
    write(tmp_path / "norm", small_run())
    alone, beside = read_runs([tmp_path / "noise-scale"]), read_runs([tmp_path / "noise-scale", tmp_path / "norm"])
    assert "test" not in [plot.name for plot in plots(alone)]
    [both] = [plot for plot in plots(beside) if plot.name == "test"]
    with drawing("test"):
        labels = [text.get_text() for text in both.draw().legends[0].get_texts()]
    assert labels == ["norm", "threshold", "measured"]


def test_a_learning_rate_that_moves_is_drawn(tmp_path: Path) -> None:
    rates = iter((0.1, 0.1, 0.2, 0.5))
    records = [record | {"lr": next(rates)} if record["kind"] == "step" else record for record in small_run()]
    write(tmp_path / "run", records)
    [plot] = [plot for plot in plots(read_runs([tmp_path / "run"])) if plot.name == "learning-rate"]
    with drawing("learning-rate"):
        axes = plot.draw().axes[0]
    assert (axes.get_yscale(), axes.get_ylim()[0]) == ("linear", 0)
    assert axes.lines[0].get_xydata().tolist() == [[16, 0.1], [32, 0.1], [64, 0.2], [96, 0.5]]


def test_a_budget_of_progress_is_not_called_one_of_samples(tmp_path: Path) -> None:
    counting = start(rate="AdaScale(base_batch_size=None, smoothing=None, progress_in='scale_invariant')")
    [run] = read_runs([write(tmp_path / "run", [counting, *small_run()[1:-1]])])
    assert "a budget of 96 samples of progress" in report_html([run])
    assert "stopped before its end, at 96 samples" in report_html([run])


def test_the_same_runs_give_the_same_page(runs: list[Run]) -> None:
    assert report_html(runs) == report_html(runs)


def test_figures_can_be_pictures(runs: list[Run]) -> None:
    plot = plots(runs)[0]
    with drawing(plot.name):
        assert png_bytes(plot.draw()).startswith(b"\x89PNG")


def test_a_name_from_the_log_is_text_never_markup(tmp_path: Path) -> None:
    write(tmp_path / "a<b>&$x$", [start(policy="<script>alert(1)</script>"), *small_run()[1:]])
    text = report_html(read_runs([tmp_path / "a<b>&$x$"]))
    assert "<script" not in text
    assert "<b>" not in text
    assert "a&lt;b&gt;&amp;$x$" in text


@pytest.mark.parametrize(
    "records",
    [
        [start()],
        [start(), step(1, 16, 16)],
        [start(), step(1, 16, 16), log(1, 16, 0.5)],
        [start(), step(1, 16, 16), log(0, 0, 0.1), log(1, 16, 1.0), end(1, 16)],
        [start(), step(1, 16, 16, measured=True, relative_variance="inf", threshold=0.25)],
        [start(), step(1, 16, 16, measured=True, relative_variance=0.3, threshold=None)],
        [start(), step(1, 16, 16), log(1, 16, 0.5) | {"metrics": {"val/accuracy": "nan"}}],
    ],
)
def test_runs_with_little_in_them_still_make_a_page(tmp_path: Path, records: list[dict[str, object]]) -> None:
    text = report_html(read_runs([write(tmp_path / "short", records)]))
    assert "short" in text


def test_many_runs_keep_their_colours_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"_a-run-with-quite-a-long-name-{n:02d}", small_run()) for n in range(9)]
    text = report_html(read_runs(paths))
    assert text.count("a-run-with-quite-a-long-name-08") > 4
    assert "stroke-dasharray" in text


def test_write_report_makes_its_folder(tmp_path: Path) -> None:
    path = write_report(read_runs([write(tmp_path, small_run())]), tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    runs = read_runs([write(tmp_path, small_run())])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package} is not installed: pip install 'adadagrad\[report\]'"):
        report_html(runs)


def test_batch_trace_has_a_point_at_each_change_only(tmp_path: Path) -> None:
    (run,) = read_runs([write(tmp_path, [*small_run()[:-2], step(5, 96, 8, reason=CUT)])])
    samples, sizes = batch_size_steps(run)
    assert (samples, sizes) == ([0, 32, 96.0], [16, 32, 32])


def test_bins_are_medians_of_neighbours() -> None:
    made = bins([(float(x), float(x % 5)) for x in range(10)], count=2)
    assert [(b.x, b.median) for b in made] == [(2.0, 2.0), (7.0, 2.0)]
    assert bins([], count=3) == []
