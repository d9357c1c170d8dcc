"""What a page is told: all at first, then what is new; all again where a log was cut back."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from adadagrad.report.live.view import LiveView
from tests.report.logs import end, log, long_run, small_run, start, step, write


def news(view: LiveView, since: str = "") -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(view.news(since), parse_constant=refuse)  # type: ignore[no-any-return]


def test_a_folder_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    view = LiveView(tmp_path / "later")
    first = news(view)
    assert first["runs"] == []
    write(tmp_path / "later", small_run()[:1])
    second = news(view, first["next"])
    assert [run["state"] for run in second["runs"]] == ["running"]
    assert second["runs"][0]["rows"] == []
    write(tmp_path / "later", small_run()[:2])
    assert len(news(view, second["next"])["runs"][0]["rows"]) == 1


def test_an_empty_log_waits(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert news(LiveView(tmp_path))["runs"][0]["state"] == "waiting"


def test_only_what_is_new_is_told_again(tmp_path: Path) -> None:
    records = small_run()
    path = write(tmp_path, records[:4])
    view = LiveView(tmp_path)
    first = news(view)
    (run,) = first["runs"]
    assert (run["from"], len(run["rows"]), run["metrics"]) == (0, 2, {"val/accuracy": [[32, 0.5]]})
    assert run["last"]["noise_scale"] == "inf"
    with path.open("a") as file:
        file.write(json.dumps(records[4]) + "\n" + json.dumps(records[5])[:20])
    second = news(view, first["next"])
    (run,) = second["runs"]
    assert (run["from"], [row[0] for row in run["rows"]]) == (2, [64])
    assert "metrics" not in run
    third = news(view, second["next"])
    assert (third["runs"][0]["from"], third["runs"][0]["rows"]) == (3, [])
    write(tmp_path, records)
    (run,) = news(view, third["next"])["runs"]
    assert (run["state"], run["from"], [row[0] for row in run["rows"]]) == ("finished", 3, [96])
    assert run["metrics"]["val/accuracy"] == [[32, 0.5], [64, 0.75], [96, 0.625]]


def test_a_log_that_was_cut_back_starts_over(tmp_path: Path) -> None:
    records = small_run()
    write(tmp_path, records)
    view = LiveView(tmp_path)
    first = news(view)
    write(tmp_path, records[:2])
    second = news(view, first["next"])
    (run,) = second["runs"]
    assert (run["state"], run["from"], len(run["rows"]), run["metrics"]) == ("running", 0, 1, {})
    write(tmp_path, [*records[:2], step(2, 32, 16, loss=5.0)])
    (run,) = news(view, second["next"])["runs"]
    assert (run["from"], [row[3] for row in run["rows"]]) == (1, [5.0])
    (tmp_path / "run.jsonl").unlink()
    assert news(view)["runs"][0]["state"] == "waiting"


@pytest.mark.parametrize("since", ["", "x", "_1.2.3", "0" * 16, "0" * 16 + "_1.2.1", "9" * 5000, "../", "\0"])
def test_a_word_that_is_not_ours_begins_anew(tmp_path: Path, since: str) -> None:
    write(tmp_path, small_run())
    (run,) = news(LiveView(tmp_path), since)["runs"]
    assert (run["from"], len(run["rows"])) == (0, 4)


def test_what_another_server_has_told_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, small_run())
    token = news(LiveView(tmp_path))["next"]
    assert news(LiveView(tmp_path), token)["runs"][0]["from"] == 0


def test_runs_of_a_folder_are_shown_together_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "a", [start(time=2e9), step(1, 8, 8)])
    write(tmp_path / "b", [start(time=1e9), step(1, 16, 16)])
    (tmp_path / "c").mkdir()
    view = LiveView(tmp_path)
    news(view)
    first = news(view)
    assert [run["name"] for run in first["runs"]] == ["b", "a"]
    write(tmp_path / "c", [start(time=3e9), step(1, 32, 32)])
    second = news(view, first["next"])
    assert [(run["name"], run["from"]) for run in second["runs"]] == [("b", 0), ("a", 0), ("c", 0)]
    assert [run["from"] for run in news(view, second["next"])["runs"]] == [1, 1, 1]


def test_states(tmp_path: Path) -> None:
    path = write(tmp_path, [start(), step(1, 16, 16, seconds=1.0)])
    view = LiveView(tmp_path)
    assert news(view)["runs"][0]["state"] == "running"
    for quiet, state in ((20, "running"), (60, "stalled")):
        os.utime(path, (0, time.time() - quiet))
        assert news(view)["runs"][0]["state"] == state
    write(tmp_path, [start(), step(1, 16, 16, seconds=20.0)])  # a step takes 20 s: one minute is nothing
    os.utime(path, (0, time.time() - 60))
    assert news(view)["runs"][0]["state"] == "running"
    write(tmp_path, [start(), step(1, 16, 16), end(1, 16)])
    assert news(view)["runs"][0]["state"] == "finished"
    write(tmp_path, [start(), step(1, 16, 16), end(1, 16), step(2, 32, 16)])  # resumed with more samples
    assert news(view)["runs"][0]["state"] == "running"


def test_what_cannot_be_read_is_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path, small_run())
    nested = "[" * 100_000
    broken = ['{"kind": "step"}', "[]", "nonsense", '{"kind": "log", "metrics": 3}', nested, '{"kind": "later"}', ""]
    path.write_text("\n".join(broken) + "\n" + path.read_text())
    (run,) = news(LiveView(tmp_path))["runs"]
    assert (run["broken"], len(run["rows"])) == (5, 4)


def test_numbers_that_are_none_do_not_stop_the_page(tmp_path: Path) -> None:
    large = 10**400
    odd = [
        step(2, 32, large),
        step(3, large, 16),
        step(4, 48, 16, loss=large),
        step(5, 64, 16) | {"step": "five"},
        {"kind": "skip"},
    ]
    path = write(tmp_path / "a", [start(time="yesterday"), step(1, 16, 16), *odd])
    write(tmp_path / "b", [start(time=1e9)])
    view = LiveView(tmp_path)
    news(view)  # which learns when they began
    first, second = news(view)["runs"]
    assert (first["name"], second["name"], second["state"]) == ("b", "a", "running")
    assert [row[0] for row in second["rows"]] == [16, 64]
    assert (second["broken"], second["skipped"]) == (4, 0)
    os.utime(path, (0, time.time() - 60))
    assert news(view)["runs"][1]["state"] == "stalled"


def test_skipped_steps_are_counted(tmp_path: Path) -> None:
    write(tmp_path, [start(), step(1, 16, 16), step(2, 16, 16, kind="skip", loss="nan")])
    (run,) = news(LiveView(tmp_path))["runs"]
    assert (run["skipped"], run["last"]["loss"], len(run["rows"])) == (1, "nan", 1)


def test_a_long_log_comes_in_parts_and_thinned(tmp_path: Path) -> None:
    records = long_run(1, total=100_000)
    assert len(records) > 100_000
    records += [log(100_000, 100_000, float(value), "loss/many") for value in range(5000)]
    write(tmp_path, [record for record in records if record["kind"] != "end"])
    view = LiveView(tmp_path, most=2 << 20)
    answers, token, began = [], "", time.perf_counter()
    while not answers or answers[-1]["more"]:
        answers.append(news(view, token))
        token = answers[-1]["next"]
    seconds = time.perf_counter() - began
    assert len(answers) > 5
    assert seconds < 60
    (run,) = news(view)["runs"]
    assert 500 < len(run["rows"]) < 1200
    assert run["rows"][-1][0] == 100_000
    assert len(view.news()) < 250_000
    assert 1000 <= len(run["metrics"]["loss/many"]) <= 2000
    assert run["metrics"]["loss/many"][-1] == [100_000, 4999.0]
    known: list[Any] = []
    for answer in answers:  # as the page puts them together
        known = known[: answer["runs"][0]["from"]] + answer["runs"][0]["rows"]
    assert known == run["rows"]
