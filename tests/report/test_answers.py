"""The answers of a run: which runs have them, what the tables hold, what the sentences say."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from adadagrad.report.advice import advice
from adadagrad.report.answers import WATCHING, Answers, answers
from adadagrad.report.noise import NoiseScale, Stretch
from adadagrad.report.page import report_html
from adadagrad.report.reader import read_run, read_runs
from tests.report.logs import end, small_run, start, step, write
from tests.report.test_noise import row


def watched(
    directory: Path, scales: list[float], steps: int = 20, size: int = 64, wobble: float = 0.01, **changes: Any
) -> Path:
    """A run of stretches whose noise scales are known: V = 100, |grad F|^2 = 100 / B, s a little off."""
    noise = random.Random(1)
    records = [start(policy=WATCHING, dataset_size=10**9, total_samples=len(scales) * steps * size)]
    for number in range(1, len(scales) * steps + 1):
        scale = scales[(number - 1) // steps]
        s = 100 / scale + (100 / size) * (1 + wobble * noise.choice((-1, 1)))
        more = {"measured": True, "grad_norm_sq": s, "variance_trace": 100.0, "inner_product_variance": 3 * s * s}
        records.append(step(number, number * size, size, loss=2.0 - number / 1000, **more | changes))
    return write(directory, [*records, end(number, number * size)])


def found(path: Path) -> Answers:
    made = answers(read_run(path))
    assert made is not None
    return made


def test_tables_of_a_run_by_hand(tmp_path: Path) -> None:
    made = found(watched(tmp_path / "run", [64.0] * 8))
    assert made.measured == "160 steps of 64 examples of training with Adagrad, all measured"
    assert made.course is not None
    assert [cells[0] for cells in made.course.cells][::7] == ["0 to 1,280", "8,960 to 10,240"]
    assert {cells[2][:4] for cells in made.course.cells} <= {"64 (", "63 (", "65 ("}
    sizes = {cells[0]: cells[1] for cells in made.sizes.cells}
    assert sizes["diminishing returns"].startswith("64 (")
    assert sizes["norm test, eta 0.25"].startswith("960 (")
    assert sizes["norm test, eta 0.5"].startswith("190 (")
    assert sizes["inner product test, 0.9 *"].startswith("3.7 (")  # 3 / 0.81
    assert [cells[0] for cells in made.changes.cells] == ["2 x 64 = 128", "4 x 64 = 256", "8 x 64 = 512"]
    assert [cells[1][:6] for cells in made.changes.cells] == ["x 0.75", "x 0.63", "x 0.56"]  # (1 + 1/k) / 2
    assert [cells[2][:6] for cells in made.changes.cells] == ["x 1.50", "x 2.50", "x 4.50"]
    assert made.advice[0].startswith("About 64 (64 to 64) examples per step")
    assert "above 260 mostly waste samples" in made.advice[0]
    assert "below 16 mostly waste steps" in made.advice[0]
    assert len(made.advice) == 1


@pytest.mark.parametrize("which", ["another policy", "too short", "not measured"])
def test_runs_without_answers(tmp_path: Path, which: str) -> None:
    if which == "another policy":
        path = write(tmp_path / "run", small_run())
    elif which == "too short":
        path = watched(tmp_path / "run", [64.0], steps=9)
    else:
        path = watched(tmp_path / "run", [64.0], variance_trace=None)
    assert answers(read_run(path)) is None


def test_weights_that_stand_still_are_one_stretch(tmp_path: Path) -> None:
    made = found(watched(tmp_path / "run", [64.0] * 8, lr=0.0))
    assert made.course is None
    assert made.sizes.headings == ["batch size", "these weights"]
    assert "at weights that stood still" in made.measured


def test_what_cannot_be_told_from_noise_is_said_in_words(tmp_path: Path) -> None:
    made = found(watched(tmp_path / "run", [1e6] * 8, wobble=0.5))
    assert made.advice[0].startswith("More than 64 examples per step: at 64 the gradient cannot be told from its noise")
    assert "--global-batch-size 256" in made.advice[0]
    assert made.sizes.cells[0][1].startswith("at least ")
    assert all("inf" not in cell and "nan" not in cell for table in made.tables for row in table.cells for cell in row)


def test_sizes_beyond_the_data_have_a_note(tmp_path: Path) -> None:
    records = watched(tmp_path / "run", [64.0] * 8).read_text()
    (tmp_path / "run" / "run.jsonl").write_text(records.replace(str(10**9), "500"))
    assert any("A size above 500" in note for note in found(tmp_path / "run").sizes.notes)


def _part(scale: float, loss: float, error: float = 1e-6) -> Stretch:
    rows = (row(1, 1, size=64, loss=loss),) * 10
    return Stretch(rows=rows, noise=NoiseScale(inverse=1 / scale, error=error, freedom=9))


def test_growth_and_a_loss_that_does_not_fall_are_said() -> None:
    whole = NoiseScale(inverse=0.01, error=0.0001, freedom=100)
    parts = [_part(50, 2.0), _part(500, 1.0)]
    assert "The noise scale grew from about 50 to about 500" in advice(whole, parts, 64, None)[1]
    assert len(advice(whole, [_part(50, 2.0), _part(90, 1.0)], 64, None)) == 1
    grown = advice(whole, [_part(50, 2.0), _part(500, 1.0, error=0.01)], 64, None)
    assert len(grown) == 1  # as far as its error tells, it may be 50 still
    assert advice(whole, [_part(50, 2.0), _part(60, 2.0)], 64, None)[1].startswith("The loss did not fall (2.0000 to")
    assert len(advice(whole, [_part(50, 2.0)], 64, None)) == 1


def test_a_noise_scale_of_the_size_of_the_data_wants_all_the_memory_there_is() -> None:
    whole = NoiseScale(inverse=0.01, error=0.0001, freedom=100)
    assert advice(whole, [_part(100, 1.0)], 64, 90)[0].startswith("As many examples per step as memory allows")
    assert advice(whole, [_part(100, 1.0)], 64, 110)[0].startswith("About 100 (98 to 100)")


def test_steps_that_differ_too_much_are_no_reason_for_a_larger_batch() -> None:
    """1/B may be 0, or up to 1/42: at 64 examples that is no evidence that the batch is too small."""
    unsure = NoiseScale(inverse=0.01, error=0.006, freedom=9)
    assert advice(unsure, [_part(100, 1.0)], 64, None)[0].startswith("These steps do not say which batch size")
    assert "may be 42 examples or any" in advice(unsure, [_part(100, 1.0)], 64, None)[0]
    assert advice(unsure, [_part(100, 1.0)], 40, None)[0].startswith("More than 40 examples")


@pytest.mark.parametrize("inverse", [math.inf, 3.0])
def test_a_noise_scale_below_one_example_wants_one(inverse: float) -> None:
    whole = NoiseScale(inverse=inverse, error=0.0, freedom=100)
    assert advice(whole, [_part(100, 1.0)], 64, None)[0].startswith("One example per step: the noise scale, about 0")


def test_statistics_of_the_step_itself_come_before_averages(tmp_path: Path) -> None:
    own = {"step_grad_norm_sq": 7.0, "step_variance_trace": "inf"}
    both = step(1, 64, 64, measured=True, grad_norm_sq=5.0, variance_trace=9.0, inner_product_variance=2.0, **own)
    plain = {key: value for key, value in both.items() if key not in own}
    rows = read_run(write(tmp_path / "run", [start(), both, plain])).steps
    assert [r.grad_norm_sq for r in rows] == [7.0, 5.0]
    assert [r.variance_trace for r in rows] == [float("inf"), 9.0]
    assert [r.inner_product_variance for r in rows] == [2.0, 2.0]


def test_the_page_has_the_answers_of_each_such_run(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    paths = [watched(tmp_path / name, [64.0] * 8) for name in "ab"]
    write(tmp_path / "other", small_run())
    text = report_html(read_runs(paths[:1]))
    assert text.count("Which batch size</h2>") == 1
    assert "About 64 (64 to 64) examples per step" in text
    assert text.count("<table>") == 4
    assert "Which batch size: b</h2>" in report_html(read_runs([*paths, tmp_path / "other"]))
    assert "Which batch size" not in report_html(read_runs([tmp_path / "other"]))


def test_changes_lie_in_their_intervals(tmp_path: Path) -> None:
    for cells in found(watched(tmp_path / "run", [64.0] * 8, wobble=0.9)).changes.cells:
        for cell in cells[1:]:
            value, low, high = (float(number) for number in re.findall(r"\d+\.\d+", cell))
            assert low < value < high
