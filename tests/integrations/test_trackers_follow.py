"""A log goes into a tracker once, line by line, over stops, cuts and half-written lines."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from adadagrad.core.errors import CorruptLog, InvalidArgument
from adadagrad.integrations.trackers import Follower, follow
from tests.integrations.trackers import Memory
from tests.report.logs import end, log, small_run, start, step, write


def lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_every_line_is_sent_once_with_samples_and_step(tmp_path: Path) -> None:
    write(tmp_path, small_run())
    memory = Memory()
    assert follow(tmp_path, memory) == 7
    assert [(number, seen) for number, seen, _ in memory.calls] == [
        (1, 16), (2, 32), (2, 32), (3, 64), (3, 64), (4, 96), (4, 96),
    ]  # fmt: skip
    assert memory.calls[0][2] == {
        "adadagrad/samples_drawn": 16.0,
        "adadagrad/global_batch_size": 16.0,
        "adadagrad/loss": 1.0,
        "adadagrad/lr": 0.1,
        "adadagrad/seconds": 0.1,
        "adadagrad/measure_seconds": 0.01,
        "adadagrad/noise_scale": 40.0,
        "adadagrad/relative_variance": 0.5,
        "adadagrad/threshold": 0.25,
    }
    assert memory.calls[1][2]["adadagrad/noise_scale"] == math.inf
    assert math.isnan(memory.calls[1][2]["adadagrad/relative_variance"])
    assert memory.calls[2][2] == {"val/accuracy": 0.5}
    assert memory.closed == 0


def test_words_are_left_out_of_metrics_and_skipped_steps_are_sent(tmp_path: Path) -> None:
    note = log(0, 0, 0.1) | {"metrics": {"note": "warm", "n": 3, "flag": True}}
    write(tmp_path, [start(), note, step(1, 0, 16, loss="nan", kind="skip")])
    memory = Memory()
    follow(tmp_path, memory)
    assert memory.calls[0] == (0, 0, {"n": 3.0})
    assert math.isnan(memory.calls[1][2]["adadagrad/loss"])


def test_without_a_mark_all_is_sent_again_and_with_one_only_what_is_new(tmp_path: Path) -> None:
    records = small_run()
    path, mark = write(tmp_path, records[:4]), tmp_path / "mark"
    assert [follow(tmp_path, Memory()), follow(tmp_path, Memory())] == [3, 3]
    assert [follow(tmp_path, Memory(), mark=mark), follow(tmp_path, Memory(), mark=mark)] == [3, 0]
    with path.open("ab") as file:
        file.write(lines(records[4:]))
    memory = Memory()
    assert follow(tmp_path, memory, mark=str(mark)) == 4
    assert [number for number, _, _ in memory.calls] == [3, 3, 4, 4]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_resume_that_cut_the_log_back_sends_nothing_twice(tmp_path: Path, restarted: bool) -> None:
    records = small_run()
    path, memory = write(tmp_path, records[:6]), Memory()
    follower = Follower(tmp_path, memory, mark=tmp_path / "mark")
    follower.catch_up()
    write(tmp_path, records[:2])  # back to the first step
    if restarted:
        follower = Follower(tmp_path, memory, mark=tmp_path / "mark")
    assert follower.catch_up() == 0
    again = [record | {"seconds": 9.0} for record in records[2:]]  # the same steps at another speed
    with path.open("ab") as file:
        for record in again:
            file.write(lines([record]))
            file.flush()
            follower.catch_up()
    assert [(number, seen) for number, seen, _ in memory.calls] == [
        (1, 16), (2, 32), (2, 32), (3, 64), (3, 64), (4, 96), (4, 96),
    ]  # fmt: skip
    assert [numbers.get("adadagrad/seconds") for _, _, numbers in memory.calls][3:6] == [0.3, None, 9.0]
    assert follower.finished


def test_a_log_that_was_cut_and_has_grown_past_where_it_was_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, [start(), step(1, 16, 16), step(2, 32, 16)])
    memory = Memory()
    follower = Follower(tmp_path, memory)
    follower.catch_up()
    write(tmp_path, [start(), step(1, 16, 16), *(step(n, 16 + 8 * n, 8, loss=2.0) for n in range(2, 9))])
    assert follower.catch_up() == 6
    assert [number for number, _, _ in memory.calls] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert memory.calls[2][1] == 40


def test_a_run_begun_anew_in_the_same_place_goes_on_and_another_one_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    write(tmp_path, [start(), step(1, 16, 16)])
    follow(tmp_path, Memory(), mark=mark)
    write(tmp_path, [start(time=1.8e9), step(1, 16, 16), step(2, 32, 16)])
    assert follow(tmp_path, Memory(), mark=mark) == 1
    write(tmp_path, [start(seed=1), step(1, 16, 16)])
    with pytest.raises(InvalidArgument, match="is not the run that was followed before: follow another"):
        follow(tmp_path, Memory(), mark=mark)


def test_a_half_written_line_waits(tmp_path: Path) -> None:
    whole = lines([start(), step(1, 16, 16), step(2, 32, 16)])
    memory, path = Memory(), tmp_path / "run.jsonl"
    follower = Follower(tmp_path, memory)
    assert follower.catch_up() == 0
    for stop in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:stop])
        follower.catch_up()
    path.write_bytes(whole)
    follower.catch_up()
    assert [number for number, _, _ in memory.calls] == [1, 2]


def test_what_a_tracker_failed_to_take_is_sent_again_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, small_run())
    memory, mark = Memory(fails_at=3), tmp_path / "mark"
    follower = Follower(tmp_path, memory, mark=mark)
    with pytest.raises(ConnectionError):
        follower.catch_up()
    assert json.loads(mark.read_text()) | {"start": 0} == {"start": 0, "step": 2, "logged": 1}
    memory.fails_at = None
    assert follower.catch_up() == 4
    assert [number for number, _, _ in memory.calls] == [1, 2, 2, 3, 3, 4, 4]


def test_it_waits_for_a_run_until_its_end(tmp_path: Path) -> None:
    memory = Memory()
    sent: list[int] = []
    run = tmp_path / "later"
    thread = threading.Thread(target=lambda: sent.append(follow(run, memory, wait=True, poll_seconds=0.01)))
    thread.start()
    write(run, [start(), step(1, 16, 16)])
    deadline = time.monotonic() + 20
    while not memory.calls and time.monotonic() < deadline:
        time.sleep(0.01)
    assert thread.is_alive()
    with (run / "run.jsonl").open("ab") as file:
        file.write(lines([step(2, 32, 16), end(2, 32)]))
    thread.join(20)
    assert sent == [2]


LARGE = "1" + 400 * "0"


@pytest.mark.parametrize(
    "line",
    [
        "broken",
        "[]",
        '{"kind": "step"}',
        '{"kind": "log", "step": 1, "samples_seen": 1}',
        f'{{"kind": "step", "step": 2, "samples_seen": 32, "loss": {LARGE}}}',
        f'{{"kind": "log", "step": 1, "samples_seen": 16, "metrics": {{"a": {LARGE}}}}}',
        "[" * 100_000,
    ],
    ids=range(7),
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, [start(), step(1, 16, 16)])
    path.write_text(path.read_text() + line + "\n")
    memory = Memory()
    with pytest.raises(CorruptLog, match=r"run\.jsonl, line 3: not a record"):
        follow(tmp_path, memory)
    assert len(memory.calls) == 1


def test_wrong_arguments(tmp_path: Path) -> None:
    (tmp_path / "mark").write_text("{}")
    with pytest.raises(InvalidArgument, match="mark must be a file that a follower has written, got "):
        Follower(tmp_path, Memory(), mark=tmp_path / "mark")
    with pytest.raises(InvalidArgument, match="mark must be in a folder that exists, got "):
        Follower(tmp_path, Memory(), mark=tmp_path / "nowhere" / "mark")
    with pytest.raises(InvalidArgument, match="poll_seconds must be > 0, got 0"):
        follow(tmp_path, Memory(), poll_seconds=0)
