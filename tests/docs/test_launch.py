"""docs/launch.md: its first block runs under torchrun as it stands, and the options of torchrun that it names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT, blocks, read

PAGE = read("launch.md")


def texts(language: str) -> list[str]:
    return [block.text for block in blocks("launch.md") if block.language == language]


def test_the_script_runs_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(texts("python")[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_the_batch_script_is_a_script(tmp_path: Path) -> None:
    (script,) = (text for text in texts("bash") if text.startswith("#!"))
    (tmp_path / "job.sh").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], timeout=60).returncode == 0


def test_every_option_of_torchrun_that_it_names_exists() -> None:
    from torch.distributed.run import get_args_parser

    known = set(get_args_parser()._option_string_actions)
    named = {
        flag for line in re.findall(r"torchrun[^`\n]*(?:\\\n[^`\n]*)*", PAGE) for flag in re.findall(r"--[a-z-]+", line)
    }
    ours = {"--data", "--model", "--device"}
    assert len(named - ours) >= 5
    assert named - ours <= known
