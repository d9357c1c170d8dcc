"""Without flwr the import says which extra brings it; with it or without it, the library itself imports neither."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import adadagrad


def python(line: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(adadagrad.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, env=environment, timeout=120)


def test_a_missing_flwr_is_an_error_that_names_the_extra() -> None:
    done = python("import sys; sys.modules['flwr'] = None; import adadagrad.integrations.flower")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "adadagrad.core.errors.MissingExtra: flwr is not installed: pip install 'adadagrad[flower]'"
    )


def test_federated_training_needs_no_flwr() -> None:
    done = python("import sys; sys.modules['flwr'] = None; import adadagrad.federated, adadagrad.integrations")
    assert done.returncode == 0, done.stderr
