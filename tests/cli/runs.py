"""Short runs of the command line on the digits, and their logs without times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLAIN = ["--data", "digits", "--samples", "600"]
CONSTANT = [*PLAIN, "--global-batch-size", "16", "--policy", "constant"]
MEASURED = [*PLAIN, "--global-batch-size", "16", "--measure-every", "2"]
SHORT = [*MEASURED, "--policy", "norm", "--eta", "0.5"]


def records(directory: Path) -> list[dict[str, Any]]:
    """The log without what differs from run to run: times."""
    times = {"time", "seconds", "measure_seconds"}
    lines = (directory / "run.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in times} for line in lines]
