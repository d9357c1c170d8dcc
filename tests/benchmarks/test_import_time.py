"""The table of import times, on made-up times, and one round of real ones."""

from __future__ import annotations

import pytest

from benchmarks import import_time


def test_the_table_takes_differences_within_a_round() -> None:
    found = {"import torch": [1.0, 2.0, 3.0], "import adadagrad": [1.1, 2.1, 3.3]}
    rows = import_time.table(found).splitlines()[2:]
    assert rows == [
        "| import torch | 2.000 | +0.000 | +0.000 to +0.000 |",
        "| import adadagrad | 2.100 | +0.100 | +0.100 to +0.300 |",
    ]


def test_the_first_round_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(import_time, "seconds", lambda code: calls.append(code) or float(len(calls)))  # type: ignore[func-returns-value]
    assert import_time.measure(1) == dict(zip(import_time.ROWS, [[5.0], [6.0], [7.0], [8.0]], strict=True))
    assert calls == [*import_time.ROWS.values()] * 2


def test_a_line_runs_in_a_fresh_interpreter() -> None:
    assert import_time.seconds("import sys; assert 'torch' not in sys.modules") > 0
