"""Steps in buckets: exact while they are few, bounded and faithful when they are many."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from adadagrad.report.live.buckets import COLUMNS, Buckets, number
from tests.report.logs import step


def rows(records: list[dict[str, Any]], most: int = 1200) -> list[dict[str, float | None]]:
    buckets = Buckets(most=most)
    for record in records:
        buckets.add(record)
    return [dict(zip(COLUMNS, bucket.row(), strict=True)) for bucket in buckets.all]


def test_a_row_is_a_step_while_they_are_few() -> None:
    measured = {"relative_variance": 0.5, "threshold": 0.25, "requested": 40.0}
    assert rows([step(1, 16, 16, loss=2.0, **measured), step(2, 48, 32, lr=0.2)]) == [
        {"seen": 16, "seconds": 0.1, "size": 16, "loss": 2.0, "loss_low": 2.0, "loss_high": 2.0, "lr": 0.1,
         "left": 0.5, "right": 0.25, "requested": 40.0},
        {"seen": 48, "seconds": 0.2, "size": 32, "loss": 1.0, "loss_low": 1.0, "loss_high": 1.0, "lr": 0.2,
         "left": None, "right": None, "requested": None},
    ]  # fmt: skip


def test_what_is_not_finite_is_no_number() -> None:
    (row,) = rows([step(1, 16, 16, loss="nan", relative_variance="inf", requested="inf", threshold="-inf", lr="nan")])
    assert row == dict.fromkeys(COLUMNS) | {"seen": 16, "seconds": 0.1, "size": 16}


def test_many_steps_are_bounded_and_keep_ends_means_and_extremes() -> None:
    count, size = 10_000, 4
    records = [
        step(n, n * size, size, loss=float(n % 7), lr=float(n), relative_variance=2.0 ** (n % 2))
        for n in range(1, count + 1)
    ]
    found = rows(records, most=64)
    assert 32 <= len(found) < 64
    assert found[-1]["seen"] == count * size
    assert found[-1]["lr"] == count
    assert (found[3]["loss_low"], found[3]["loss_high"]) == (0.0, 6.0)
    assert found[3]["loss"] == pytest.approx(3.0, abs=0.1)
    assert found[3]["left"] == pytest.approx(math.sqrt(2.0), rel=1e-4)
    seen = [row["seen"] or 0 for row in found]
    widths = {later - before for before, later in pairwise(seen[:-1])}
    assert len(widths) == 1


@pytest.mark.parametrize("most", [8, 9])
def test_closed_rows_do_not_change_until_pairs_are_joined(most: int) -> None:
    buckets = Buckets(most=most)
    before: tuple[int, list[Any]] = (0, [])
    for n in range(1, 200):
        buckets.add(step(n, n, 1, loss=float(n)))
        closed = [bucket.row() for bucket in buckets.all[: buckets.closed]]
        if buckets.joined == before[0]:
            assert closed[: len(before[1])] == before[1]
        total = sum(bucket.loss.count for bucket in buckets.all)
        assert total == n
        before = (buckets.joined, closed)
    assert buckets.joined >= 4


def test_a_step_that_the_budget_cuts_short_leaves_size_and_rate() -> None:
    found = rows([step(1, 64, 64, lr=0.4), step(2, 100, 36, lr=0.2, reason="short batch")])
    assert [(row["size"], row["lr"]) for row in found] == [(64, 0.4), (64, None)]
    assert rows([step(1, 36, 36, reason="short batch")])[0]["size"] == 36


def test_numbers_of_the_log() -> None:
    assert [number(value) for value in (1, 2.5, "inf", "-inf", None, True, "word", [1])] == [
        1.0, 2.5, math.inf, -math.inf, None, None, None, None,
    ]  # fmt: skip
    assert math.isnan(number("nan") or 0.0)
