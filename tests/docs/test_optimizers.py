"""docs/optimizers.md: its Python runs from the first block to the last, and its table names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adadagrad as ada
from adadagrad import optimizers

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")


def test_every_python_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/optimizers.md", "exec"), names)
    engine = names["engine"]
    assert engine.samples_seen == 1024  # type: ignore[attr-defined]
    assert engine.global_batch_size > 16  # type: ignore[attr-defined]
    said = capsys.readouterr().out
    assert "'entries': 640, 'chosen': 33" in said
    assert "'0': " in said


def test_every_optimizer_is_in_the_table_and_public() -> None:
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    for name in optimizers.__all__:
        assert f"`{name}`" in table
        assert name in ada.__all__
