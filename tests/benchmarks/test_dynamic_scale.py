"""The comparison of dynamic scale training in a reduced form: it runs to its tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.neighbours import dynamic_scale


def test_the_study_runs_to_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_scale, "TRAIN_SCENES", 40)
    monkeypatch.setattr(dynamic_scale, "TEST_SCENES", 10)
    rows, differences, found = dynamic_scale.study(seeds=2, steps=4, jobs=1, names=list(dynamic_scale.FEEDBACK))
    assert [row[0] for row in rows] == list(found)
    assert [row[0] for row in rows][:3] == ["never", "threshold 0.1", "random, share of threshold 0.1"]
    assert len(rows) == 11
    assert [row[0].partition(" minus ")[2] for row in differences] == ["random", "alternate"] * 4
    assert [row[3] for row in rows if row[0] == "alternate"] == ["0.50 ± 0.00"]
    assert all(len(row) == len(dynamic_scale.HEADS) for row in rows)
    assert rows[0][3:] == ["0.00 ± 0.00", rows[0][4], "32"]
    assert rows[-1][3] == "1.00 ± 0.00"
    assert rows[-1][5] == "128"
    for name in dynamic_scale.FEEDBACK:
        random = found[f"random, share of {name}"]
        assert [one["p"] for one in random] == [one["stitched"] for one in found[name]]
        assert [one["seed"] for one in random] == [0, 1]
