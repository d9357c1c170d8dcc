"""``adadagrad watch``: one line that says where the page is, and Ctrl-C ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import webbrowser
from pathlib import Path

import pytest

import adadagrad
from adadagrad.cli import main
from tests.report.logs import small_run, write

pytest.importorskip("jinja2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    write(tmp_path / "run", small_run())
    command = [sys.executable, "-m", "adadagrad", "watch", str(tmp_path / "run"), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(adadagrad.__file__).parents[1]), "PYTHONWARNINGS": "error"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"watching {tmp_path / 'run'}: http://127.0.0.1:")
        assert line.endswith(" (Ctrl-C ends it)\n")
        with urllib.request.urlopen(line.split()[2] + "data", timeout=30) as answer:
            assert len(json.load(answer)["runs"][0]["rows"]) == 4
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error) == (0, "", "stopped watching\n")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.jsonl"}


@pytest.mark.parametrize(("options", "opened"), [([], 0), (["--open"], 1)])
def test_a_browser_is_opened_where_that_is_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    opened: int,
) -> None:
    urls: list[str] = []
    monkeypatch.setattr(webbrowser, "open", urls.append)

    def press() -> None:
        deadline = time.monotonic() + 30
        said = ""
        while "http" not in said and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capsys.readouterr().out
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    assert main(["watch", str(tmp_path / "later" / "run.jsonl"), "--port", "0", *options]) == 0
    thread.join()
    assert len(urls) == opened
    assert not (tmp_path / "later").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["file"], "RUN_DIR must be a folder, got the file "),
        ([".", "--port", "65536"], "--port must be between 0 and 65535, got 65536"),
        ([".", "--port", "-1"], "--port must be between 0 and 65535, got -1"),
        ([".", "--host", "192.0.2.1", "--port", "0"], "--host 192.0.2.1 --port 0 cannot be listened at ("),
    ):
        assert main(["watch", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_without_jinja2_it_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["watch", str(tmp_path), "--port", "0"]) == 2
    assert "jinja2 is not installed: pip install 'adadagrad[report]'" in capsys.readouterr().err
