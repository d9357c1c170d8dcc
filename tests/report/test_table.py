"""The table's numbers, by hand."""

from __future__ import annotations

from pathlib import Path

from adadagrad.report.reader import read_run, read_runs
from adadagrad.report.run import CUT, Run, accuracy_metric
from adadagrad.report.table import Table, comparison_table, summarize, table_text
from adadagrad.report.thinning import batch_size_steps
from tests.report.logs import end, log, small_run, start, step, write


def test_row_by_hand(tmp_path: Path) -> None:
    row = summarize(read_run(write(tmp_path, small_run())))
    assert (row.steps, row.mean_batch_size, row.last_batch_size, row.samples) == (4, 24.0, 32, 96)
    assert (row.seconds, row.measure_seconds) == (0.4, 0.04)
    assert (row.best_accuracy, row.last_accuracy) == (0.75, 0.625)


def test_last_step_that_the_budget_cut_is_not_the_last_batch_size(tmp_path: Path) -> None:
    records = [start(total_samples=40), step(1, 16, 16), step(2, 32, 16), step(3, 40, 8, reason=CUT), end(3, 40)]
    row = summarize(read_run(write(tmp_path, records)))
    assert row.last_batch_size == 16
    assert row.mean_batch_size == 40 / 3


def test_a_batch_that_shrank_before_the_end_counts(tmp_path: Path) -> None:
    records = [start(total_samples=100), step(1, 16, 16), step(2, 24, 8)]
    assert summarize(read_run(write(tmp_path, records))).last_batch_size == 8


def test_a_run_that_counts_its_own_progress_may_go_beyond_its_budget_of_samples(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, [start(total_samples=40), step(1, 16, 16), step(2, 48, 32), step(3, 56, 8)]))
    assert summarize(run).last_batch_size == 8  # chosen, not cut
    assert batch_size_steps(run) == ([0, 16, 48, 56.0], [16, 32, 8, 8])
    assert comparison_table([run]).notes == [f"{run.name}: stopped before its end, at 56 samples"]


def test_text_and_notes(tmp_path: Path) -> None:
    write(tmp_path / "whole", small_run())
    write(tmp_path / "stopped", [*small_run()[:4], {"kind": "skip", "step": 3, "samples_seen": 32}])
    table = comparison_table(read_runs([tmp_path / "whole", tmp_path / "stopped"]))
    assert table.cells[0] == ["whole", "4", "24.0", "32", "96", "0.40", "0.04", "0.7500", "0.6250"]
    assert table.headings[-2:] == ["best validation accuracy", "last validation accuracy"]
    assert table.notes == [
        "stopped: stopped before its end, at 32 of 96 samples",
        "stopped: 1 update skipped (non-finite gradient)",
    ]
    lines = table_text(table).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["of", "best", "last"],
        ["mean", "last", "which", "validation", "validation"],
        ["run", "steps", "batch", "batch", "samples", "seconds", "measuring", "accuracy", "accuracy"],
    ]
    assert len(lines) == 8
    assert lines[4].startswith("whole  ")


def test_the_table_of_the_demo_fits_a_terminal() -> None:
    headings = comparison_table([Run(name="constant-512", start={})]).headings
    headings[-2:] = ["best validation accuracy", "last validation accuracy"]
    cells = ["constant-512", "4,491", "748.4", "1,437", "71,850", "3.50", "0.07", "0.9861", "0.9806"]
    assert max(map(len, table_text(Table(headings=headings, cells=[cells], notes=[])).splitlines())) <= 80


def test_a_run_whose_accuracy_is_another_one_is_named(tmp_path: Path) -> None:
    write(tmp_path / "one", small_run())
    write(tmp_path / "other", [start(), step(1, 96, 96), log(1, 96, 0.5, name="test/accuracy"), end(1, 96)])
    table = comparison_table(read_runs([tmp_path / "one", tmp_path / "other"]))
    assert table.cells[1][-2:] == ["-", "-"]
    assert table.notes == ["other: logged test accuracy, which is not compared with validation accuracy"]


def test_run_without_a_step(tmp_path: Path) -> None:
    table = comparison_table([read_run(write(tmp_path / "empty", [start()]))])
    assert table.cells == [["empty", "0", "-", "-", "0", "0.00", "0.00", "-", "-"]]


def test_validation_goes_before_test_and_both_before_others(tmp_path: Path) -> None:
    def run_with(*names: str) -> str | None:
        records = [start(), *(log(1, 1, 0.5, name=name) for name in names)]
        return accuracy_metric([read_run(write(tmp_path, records))])

    assert run_with("train/accuracy", "test/accuracy", "val/accuracy") == "val/accuracy"
    assert run_with("train/accuracy", "test/accuracy") == "test/accuracy"
    assert run_with("val/loss", "train/accuracy") == "train/accuracy"
    assert run_with("val/loss") is None
