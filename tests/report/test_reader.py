"""A log is read whatever byte it was cut at; a line broken in its middle is refused by file and line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from adadagrad.core.errors import CorruptLog, InvalidData
from adadagrad.report.reader import find_logs, read_run, read_runs
from tests.report.logs import log, small_run, start, step, write


def test_reads_numbers_and_what_stands_for_missing_ones(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "mine", small_run()).parent)
    assert run.name == "mine"
    assert [row.global_batch_size for row in run.steps] == [16, 16, 32, 32]
    first, second, third, _ = run.steps
    assert (first.noise_scale, first.relative_variance, first.threshold) == (40.0, 0.5, 0.25)
    assert second.noise_scale == math.inf
    assert second.relative_variance is not None
    assert math.isnan(second.relative_variance)
    assert third.noise_scale is None
    assert [row.metrics["val/accuracy"] for row in run.logs] == [0.5, 0.75, 0.625]
    assert run.end is not None
    assert run.total_samples == 96


def test_log_cut_at_every_byte(tmp_path: Path) -> None:
    path = write(tmp_path, small_run())
    content = path.read_bytes()
    first_line = content.index(b"\n")
    for length in range(len(content)):
        path.write_bytes(content[:length])
        if length < first_line:
            with pytest.raises(CorruptLog, match="no start record"):
                read_run(path)
        else:
            kept = content[:length].count(b'"kind": "step"')
            assert kept - 1 <= len(read_run(path).steps) <= kept


@pytest.mark.parametrize(
    "broken",
    [
        b'{"kind": "step", "st',
        b"\xff\xfe",
        b"[1, 2]",
        b"{}",
        b'{"kind": 3}',
        b'{"kind": "step"}',
        b'{"kind": "step", "step": "x", "samples_seen": 1, "global_batch_size": 1, "seconds": 0}',
        b'{"kind": "step", "step": "inf", "samples_seen": 1, "global_batch_size": 1, "seconds": 0}',
        b'{"kind": "log", "samples_seen": 1, "step": 1, "seconds": 0, "metrics": 3}',
    ],
)
def test_broken_line_in_the_middle_names_file_and_line(tmp_path: Path, broken: bytes) -> None:
    path = write(tmp_path, small_run())
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:4], broken, *lines[4:], b""]))
    with pytest.raises(CorruptLog, match=f"{re.escape(str(path))}, line 5"):
        read_run(path)


def test_log_without_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptLog, match=r"line 1: a run begins with a start record, got 'step'"):
        read_run(write(tmp_path, small_run()[1:]))


def test_unknown_kinds_and_words_among_metrics_are_passed_over(tmp_path: Path) -> None:
    note = log(1, 16, 0.5) | {"metrics": {"note": "warm", "val/accuracy": "nan", "val/loss": 2}}
    run = read_run(write(tmp_path, [start(), step(1, 16, 16), {"kind": "later"}, note]))
    assert set(run.logs[0].metrics) == {"val/accuracy", "val/loss"}
    assert run.series("val/accuracy") == []
    assert [value for _, value in run.series("val/loss")] == [2.0]


def test_a_second_start_replaces_what_it_trains_again(tmp_path: Path) -> None:
    again = [start(samples_seen=32), step(3, 40, 8), log(3, 40, 0.9)]
    run = read_run(write(tmp_path, small_run() + again))
    assert [row.samples_seen for row in run.steps] == [16, 32, 40]
    assert [row.metrics["val/accuracy"] for row in run.logs] == [0.5, 0.9]
    assert run.end is None


def test_skipped_updates_are_counted(tmp_path: Path) -> None:
    skip = {"kind": "skip", "step": 2, "samples_seen": 16, "reason": "skipped: non-finite", "loss": "nan"}
    assert read_run(write(tmp_path, [start(), step(1, 16, 16), skip])).skipped == 1


def test_config_beside_the_log_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, small_run())
    assert read_run(path).config is None
    (tmp_path / "config.toml").write_text("[run]\nseed = 1\n")
    assert read_run(path).config == "[run]\nseed = 1\n"


def test_finds_logs_in_a_file_a_run_and_a_folder_of_runs(tmp_path: Path) -> None:
    later = write(tmp_path / "a", [start(time=2.0)])
    earlier = write(tmp_path / "b", [start(time=1.0)])
    assert find_logs(later) == [later]
    assert find_logs(tmp_path / "a") == [later]
    assert find_logs(tmp_path) == [earlier, later]


@pytest.mark.parametrize(("place", "message"), [("nowhere", "does not exist"), (".", r"holds no run\.jsonl")])
def test_no_log_is_a_typed_error(tmp_path: Path, place: str, message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        find_logs(tmp_path / place)
    with pytest.raises(InvalidData, match="does not exist"):
        read_run(tmp_path / place)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        write(tmp_path / parent / "norm", [start()])
    write(tmp_path / "z", [start()])
    runs = read_runs([tmp_path / "x" / "norm", tmp_path / "y" / "norm", tmp_path / "z"])
    assert [run.name for run in runs] == ["x/norm", "y/norm", "z"]
    twice = read_runs([tmp_path / "z", tmp_path / "z" / "run.jsonl", tmp_path / "x" / ".." / "z"])
    assert [run.name for run in twice] == ["z"]
    with pytest.raises(InvalidData, match="no run given"):
        read_runs([])


def test_a_start_line_that_is_broken_is_reported_when_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [start()])
    path.write_text("[1]\n" + json.dumps(start()) + "\n")
    assert find_logs(tmp_path) == [path]
    with pytest.raises(CorruptLog, match="line 1"):
        read_runs([tmp_path])


def test_a_broken_log_among_others_is_left_out_where_asked(tmp_path: Path) -> None:
    for name, time in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        write(tmp_path / name, [start(time=time)])
    (tmp_path / "b" / "run.jsonl").write_text(json.dumps(start(time=2.0)) + "\nbroken\n{}\n")
    with pytest.raises(CorruptLog, match="line 2"):
        read_runs([tmp_path])
    left_out: list[CorruptLog] = []
    assert [run.name for run in read_runs([tmp_path], left_out)] == ["a", "c"]
    assert len(left_out) == 1
    assert f"{tmp_path / 'b' / 'run.jsonl'}, line 2" in str(left_out[0])
    with pytest.raises(CorruptLog, match="line 2"):
        read_runs([tmp_path / "b"], [])
