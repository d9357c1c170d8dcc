"""Killed and started again, a run under a host goes on from the host's own checkpoint: same trace, same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adadagrad
from tests.integrations.hosts import plain

WHOLE = os.environ.get("ADADAGRAD_SLOW") == "1"
"""Whether the run is killed twice, rather than once."""
HOSTS = {"accelerate": "accelerate", "fabric": "lightning"}


def run(host: str, folder: Path, *end: str) -> int:
    environment = os.environ | {"PYTHONPATH": str(Path(adadagrad.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.integrations.killed", host, str(folder), *end]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("host", list(HOSTS))
def test_killed_it_is_the_run_that_was_not(host: str, tmp_path: Path) -> None:
    pytest.importorskip(HOSTS[host])
    assert {run(host, tmp_path, end) for end in (("4", "7") if WHOLE else ("4",))} == {-9}
    assert run(host, tmp_path) == 0
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == [1, 2, 3, 3, 4, 5, 6, *range(7, max(steps) + 1)]  # the third was made again, from the checkpoint
    by_step = {line["step"]: (line["size"], line["loss"]) for line in lines}
    trace, expected = plain()
    assert [by_step[number] for number in sorted(by_step)] == trace
    assert torch.equal(torch.load(tmp_path / "weights.pt"), expected)
