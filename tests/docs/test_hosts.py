"""docs/accelerate.md and docs/fabric.md: their diffs are those of the scripts in docs/examples, and all of it runs."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
HOSTS = {"accelerate": "accelerate", "fabric": "lightning"}


def blocks(host: str, language: str) -> list[str]:
    page = (ROOT / "docs" / f"{host}.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize("host", list(HOSTS))
def test_the_diff_is_that_of_the_scripts(host: str) -> None:
    before, after = ((EXAMPLES / f"{host}_{name}.py").read_text().splitlines(True) for name in ("before", "after"))
    diff = "".join(difflib.unified_diff(before, after, "train.py", "train.py", n=2))
    assert blocks(host, "diff") == [diff]
    added = [line for line in diff.splitlines() if line.startswith("+") and len(line) > 1 and line[1] != "+"]
    assert len(added) <= 10


def python(arguments: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["before", "after"])
@pytest.mark.parametrize("host", list(HOSTS))
def test_the_scripts_run(host: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip(HOSTS[host])
    told = python([str(EXAMPLES / f"{host}_{name}.py")], tmp_path)
    assert float(re.findall(r"accuracy ([0-9.]+)", told)[0]) > 0.95


@pytest.mark.parametrize("host", list(HOSTS))
def test_the_pages_python_runs_and_resumes(host: str, tmp_path: Path) -> None:
    pytest.importorskip(HOSTS[host])
    (code,) = blocks(host, "python")
    told = python(["-c", code + "\nprint(engine.steps, resumed.samples_seen, resumed.steps > 4)"], tmp_path)
    assert told.splitlines()[-1] == "3 2000 True"
