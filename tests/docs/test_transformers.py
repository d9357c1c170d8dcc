"""The page of the Hugging Face Trainer: its diff is that of its two scripts, is small, and both scripts run."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import DOCS, ROOT, blocks

pytest.importorskip("transformers")

PATHS = [DOCS / "examples" / f"hf_{name}.py" for name in ("before", "after")]


def test_the_diff_is_that_of_the_two_scripts_and_changes_five_lines_at_most():
    before, after = (path.read_text(encoding="utf-8").splitlines() for path in PATHS)
    diff = list(difflib.unified_diff(before, after, "train.py", "train.py", lineterm="", n=2))
    (shown,) = (block.text for block in blocks("transformers.md") if block.language == "diff")
    assert shown.splitlines() == diff
    assert sum(line.startswith("+") and not line.startswith("+++") for line in diff) <= 5


def test_both_scripts_train_on_as_many_examples(tmp_path):
    said = []
    for path in PATHS:
        folder = tmp_path / path.stem
        folder.mkdir()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        found = subprocess.run(
            [sys.executable, str(path)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert found.returncode == 0, found.stderr[-2000:]
        assert (folder / "gpt2" / "model.safetensors").exists()
        loss, steps = re.search(r"loss ([\d.]+) after (\d+) steps", found.stdout).groups()
        (state,) = (folder / "gpt2").glob("checkpoint-*/trainer_state.json")
        said.append((float(loss), int(steps), json.loads(state.read_text())["epoch"]))
    (loss, steps, epoch), (our_loss, our_steps, our_epoch) = said
    assert steps == 120
    assert our_steps < 115
    assert our_epoch == pytest.approx(epoch, rel=2e-3)  # Trainer counts an epoch's last, short batch as a whole one
    assert max(loss, our_loss) < 2.8
