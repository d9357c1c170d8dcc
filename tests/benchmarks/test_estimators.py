"""The benchmark's closed forms are those of its problem, and its rows measure what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adadagrad.statistics import statistics_from_units
from benchmarks import estimators


@pytest.fixture(autouse=True)
def threads():
    """The benchmark sets torch's number of threads; what comes after it is not to notice."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ estimators.OFFSET[:, None] - y) * x


def test_the_closed_forms_are_those_of_the_drawn_gradients() -> None:
    found = statistics_from_units(rows_of(*estimators.draw(200_000, torch.Generator().manual_seed(0))))
    trace, signal = estimators.truth()
    assert found.variance_trace == pytest.approx(trace, rel=0.02)
    assert found.true_grad_norm_sq == pytest.approx(signal, rel=0.03)


@pytest.mark.parametrize("row", estimators.ROWS, ids=lambda row: row.name)
def test_every_row_measures_its_part_of_the_batch(row: estimators.Row) -> None:
    x, y = estimators.draw(320, torch.Generator().manual_seed(1))
    record = estimators.measurer(row)(x, y)
    rows = rows_of(x, y)
    assert record.num_units == (row.units or row.measured(320))
    assert record.grad_norm_sq == pytest.approx(float(rows.mean(0).square().sum()), rel=1e-10)
    if row.units:
        units = torch.stack([part.mean(0) for part in rows.split(320 // row.units)])
        expected = statistics_from_units(units, unit_size=320 // row.units)
    else:
        expected = statistics_from_units(rows[: row.measured(320)])
    assert record.variance_trace == pytest.approx(expected.variance_trace, rel=1e-10)
    assert record.grad_norm_sq_error > 0


def test_it_prints_a_row_for_each_estimator_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    estimators.main(["--seeds", "40", "--batch", "64"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == [row.name for row in estimators.ROWS]
    written = json.loads(Path("results/estimators.json").read_text())
    first = written["rows"]["PerExample, all"]
    assert (first["examples"], first["flop"]) == (64, 64 * 202)
    assert len(first["V"]) == len(first["B covered"]) == 40
    assert sum(first["V"]) / 40 == pytest.approx(1, abs=0.12)
    assert 0.5 < sum(first["V covered"]) / 40 <= 1
    with pytest.raises(SystemExit):
        estimators.main(["--seeds", "1"])
