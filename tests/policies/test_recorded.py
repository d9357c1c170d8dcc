"""The batch sizes of a run come again from its log, whatever ended, cut or continued that run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adadagrad.core.errors import CorruptLog, InvalidArgument
from adadagrad.policies import RecordedBatch

START = {"kind": "start", "samples_seen": 0, "global_batch_size": 4}


def step(seen: int, following: int, kind: str = "step") -> dict[str, Any]:
    return {"kind": kind, "samples_seen": seen, "next_global_batch_size": following}


def write(directory: Path, *records: dict[str, Any], rest: str = "") -> Path:
    log = directory / "run.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + rest)
    return log


def test_decisions_and_not_what_the_budget_cut(tmp_path: Path) -> None:
    log = write(tmp_path, START, step(4, 4), {"kind": "log", "metrics": {}}, step(8, 6), step(14, 9), step(17, 9))
    assert RecordedBatch.from_log(log).plan == ((0, 4), (8, 6), (14, 9))
    assert RecordedBatch.from_log(tmp_path) == RecordedBatch.from_log(str(log))


def test_a_cut_line_a_skip_and_a_resumed_run(tmp_path: Path) -> None:
    log = write(tmp_path, START, step(4, 8), step(4, 8, "skip"), step(12, 10), rest='{"kind": "step", "samp')
    assert RecordedBatch.from_log(log).plan == ((0, 4), (4, 8), (12, 10))
    again = {"kind": "start", "samples_seen": 4, "global_batch_size": 5}
    log = write(tmp_path, START, step(4, 8), step(12, 10), again, step(9, 7))
    assert RecordedBatch.from_log(log).plan == ((0, 4), (4, 5), (9, 7))


@pytest.mark.parametrize(
    ("records", "rest", "message"),
    [
        ([], "", "line 1: no start record"),
        ([step(4, 8)], "", "line 1: no decision can be read from it .*begins with a start record"),
        ([START], "nonsense\n", "line 2: not a record"),
        ([START, {"kind": "step", "samples_seen": 4}], "", "line 2: no decision .*next_global_batch_size"),
        ([START, {**step(4, 8), "samples_seen": "four"}], "", "line 2: no decision"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, records: list[Any], rest: str, message: str) -> None:
    with pytest.raises(CorruptLog, match=message):
        RecordedBatch.from_log(write(tmp_path, *records, rest=rest))


def test_a_log_that_is_not_there_or_begins_in_the_middle(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"run.jsonl does not exist"):
        RecordedBatch.from_log(tmp_path)
    with pytest.raises(InvalidArgument, match=r"begins at 8 samples seen"):
        RecordedBatch.from_log(write(tmp_path, {**START, "samples_seen": 8}))
