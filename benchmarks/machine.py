"""What a result was measured on, and where results are written."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """Return processor, threads, Python and torch in a line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        name = f"{torch.cuda.get_device_name()} beside {name}"
    return (
        f"{name}, {torch.get_num_threads()} threads, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def write_json(name: str, content: Any) -> Path:
    """Write a result.

    Args:
        name: File name without ending; it may begin with folders.
        content: Plain values.

    Returns:
        The file's path.
    """
    path = Path("results") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path
