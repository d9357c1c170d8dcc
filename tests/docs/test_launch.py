"""docs/launch.md: its Python runs from the first block to the last, and the first one under torchrun as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/launch.md", "exec"), names)
    run, again = names["run"], names["again"]
    assert run.samples_seen == again.samples_seen == 500  # type: ignore[attr-defined]
    assert run.steps == again.steps  # type: ignore[attr-defined]
    assert names["engine"].samples_seen == 6_000  # type: ignore[attr-defined]
    assert list((tmp_path / "runs/long/checkpoints").iterdir())


def test_the_script_runs_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(blocks("python")[0])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_the_batch_script_is_a_script(tmp_path: Path) -> None:
    (script,) = blocks("bash")
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
