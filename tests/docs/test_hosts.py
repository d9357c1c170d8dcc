"""The pages of trainers: their diffs are small and those of the scripts in docs/examples, and both scripts run."""

from __future__ import annotations

import difflib
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks

EXAMPLES = ROOT / "docs" / "examples"


@dataclass(frozen=True)
class Host:
    """A page, the package that its scripts need, and how many lines may be added; the loop of one's own takes more."""

    name: str
    package: str
    added: int


TRAINER = Host("lightning", "lightning", 5)
LOOPS = (Host("accelerate", "accelerate", 10), Host("fabric", "lightning", 10))


@pytest.mark.parametrize("host", [TRAINER, *LOOPS], ids=lambda host: host.name)
def test_the_diff_is_that_of_the_scripts(host: Host) -> None:
    before, after = ((EXAMPLES / f"{host.name}_{name}.py").read_text().splitlines(True) for name in ("before", "after"))
    diff = "".join(difflib.unified_diff(before, after, "train.py", "train.py", n=2))
    assert [block.text + "\n" for block in blocks(f"{host.name}.md") if block.language == "diff"] == [diff]
    added = [line for line in diff.splitlines() if re.match(r"\+(?!\+\+).*\S", line)]
    assert 0 < len(added) <= host.added


def told(script: str, folder: Path) -> str:
    """What a script prints last."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLES / script)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["before", "after"] if os.environ.get("ADADAGRAD_SLOW") == "1" else ["after"])
@pytest.mark.parametrize("host", LOOPS, ids=lambda host: host.name)
def test_the_scripts_run(host: Host, name: str, tmp_path: Path) -> None:
    pytest.importorskip(host.package)
    assert float(re.findall(r"accuracy ([0-9.]+)", told(f"{host.name}_{name}.py", tmp_path))[0]) > 0.95


def test_lightnings_script_takes_fewer_steps_with_the_callback(tmp_path: Path) -> None:
    pytest.importorskip(TRAINER.package)
    found = {}
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        loss, steps = re.findall(r"loss (\S+) after (\d+) steps", told(f"lightning_{name}.py", tmp_path / name))[0]
        assert math.isfinite(float(loss))
        assert float(loss) < math.log(128)  # of the characters, before anything is learnt
        found[name] = int(steps)
    assert found["before"] == 250
    assert found["after"] < 200
