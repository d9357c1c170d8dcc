"""docs/accelerate.md and docs/fabric.md: their diffs are those of the scripts in docs/examples, which run."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks

EXAMPLES = ROOT / "docs" / "examples"
HOSTS = {"accelerate": "accelerate", "fabric": "lightning"}


@pytest.mark.parametrize("host", list(HOSTS))
def test_the_diff_is_that_of_the_scripts(host: str) -> None:
    before, after = ((EXAMPLES / f"{host}_{name}.py").read_text().splitlines(True) for name in ("before", "after"))
    diff = "".join(difflib.unified_diff(before, after, "train.py", "train.py", n=2))
    assert [block.text + "\n" for block in blocks(f"{host}.md") if block.language == "diff"] == [diff]
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
