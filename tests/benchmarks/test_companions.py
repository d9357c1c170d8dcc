"""The companion optimizers' benchmarks in a reduced form: they run to their tables, and kept runs are read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import optimizers, splits
from benchmarks.companions import char_gpt, estimator_error, kept, large_batch, noisy_quadratic, sift_transfer
from tests.cli.mnist_folder import write_mnist


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was read from a folder of a test is not kept."""
    yield
    for load in (splits.digits, splits.mnist, splits.shakespeare, sift_transfer.halves, sift_transfer.pretrained):
        load.cache_clear()


calls: list[dict[str, Any]] = []


def parabola(*, lr: float, seed: int, part: str, top: float) -> dict[str, Any]:
    """A run whose metric is best at a known rate."""
    calls.append({"lr": lr, "seed": seed, "part": part})
    return {"metric": None if lr > 100 else -((lr - top) ** 2)}


def test_a_run_is_made_once_and_the_best_rate_is_found_one_beyond_the_grid() -> None:
    calls.clear()
    arms = [{"top": 2.0}, {"top": 8.0}, {"top": 0.1}, {"top": 1000.0}]
    best = kept.tuned("study", parabola, arms, lambda _: (1.0, 2.0, 4.0), higher=True, jobs=1, step=2.0)
    assert best == [(2.0, False), (8.0, True), (0.5, True), (8.0, True)]
    assert len(calls) == 4 * 3 + 3
    assert {(c["seed"], c["part"]) for c in calls} == {(100, "val")}
    assert kept.tuned("study", parabola, arms, lambda _: (1.0, 2.0, 4.0), higher=True, jobs=1, step=2.0) == best
    assert len(calls) == 15
    lowest = kept.tuned("study", parabola, [{"top": 3.0}], lambda _: (1.0, 2.0, 200.0), higher=True, jobs=1, step=2.0)
    assert lowest == [(2.0, False)]  # what diverges is never the best


def test_spread_says_what_diverged() -> None:
    assert kept.spread([1.0, 2.0, None]) == "1.500 ± 0.707 (1 diverged)"
    assert kept.spread([None]) == "diverged"
    assert kept.spread([3.0], 1) == "3.0 ± 0.0"


def test_estimator_error_is_the_variance_of_the_moment() -> None:
    """At rest: 0.05^2 / (1 - 0.95^2) = 0.02564 for the average, exact or not; (derived) 0.02744 for gamma = 0.025."""
    for mode, gamma, expected in (
        ("exact", 1.0, 0.02564),
        ("approximate", 0.0, 0.02564),
        ("approximate", 0.025, 0.02744),
    ):
        value, error = estimator_error.error(gamma, mode, lr=0.0, steps=800)
        assert value == pytest.approx(expected, rel=0.03)
        assert 0 < error < 0.03 * expected
    assert len(estimator_error.study(20)) == 16


def test_noisy_quadratic_tells_the_methods_apart() -> None:
    rows = noisy_quadratic.study(300, 100, steps=400, rates=[4e-3, 1.2e-2])
    losses = {row["method"]: row["loss"] for row in rows}
    assert list(losses) == ["Adam", "MAdam", "LaProp", "LaMAdam"]
    assert losses["MAdam"] < losses["Adam"]
    assert losses["LaMAdam"] < losses["LaProp"]


def test_character_gpt_runs_every_arm(tmp_path: Path) -> None:
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not to be, that is the question. " * 120)
    text = char_gpt.study(list(char_gpt.ARMS), seeds=2, jobs=1, steps=4, data=str(tmp_path), width=16, blocks=1)
    lines = text.splitlines()
    assert len(lines) == 2 + len(char_gpt.ARMS)
    assert all(line.count("|") == 9 for line in lines)
    rank = lines[2 + list(char_gpt.ARMS).index("adarankgrad")]
    assert " to " in rank


def test_sift_transfer_runs_every_arm(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", train=5200, test=60)
    rows = sift_transfer.study(str(tmp_path), jobs=1, seeds=1, steps=2, epochs=0)
    assert len(rows) == 4 * 4 + 2
    assert [row[2] for row in rows[:4]] == ["138"] * 4
    assert rows[-1][1] == "head"


def test_large_batch_runs_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setitem(large_batch.TASKS, "digits", {**large_batch.TASKS["digits"], "steps": 2, "batch": 64})
    for arm, (label, rates, ratios) in list(large_batch.ARMS.items()):
        monkeypatch.setitem(large_batch.ARMS, arm, (label, rates[:2], ratios[:2]))
    rows = large_batch.study(["digits"], str(tmp_path), jobs=1, seeds=2, tuning=1)
    assert len(rows) == 6
    assert all(row[0] == "digits" for row in rows)


def test_state_bytes_are_those_of_the_formulas() -> None:
    """Times are never asserted; what is held is."""
    found = {r["name"]: r for r in optimizers.compare(optimizers.ROWS, rounds=1, width=64, blocks=1)}
    assert len(found) == len(optimizers.ROWS)
    assert found["control: AdamW of torch"]["of_adamw"] == pytest.approx(1, abs=0.01)
    assert found["MAdam"]["of_adamw"] == pytest.approx(2, abs=0.01)
    assert found["LaMAdam"]["of_adamw"] == pytest.approx(2, abs=0.01)
    assert found["MARS"]["of_adamw"] == pytest.approx(1.5, abs=0.02)  # vectors keep no last gradient
    assert found["MARS, lion, nothing clipped"]["of_adamw"] == pytest.approx(0.5, abs=0.02)
    assert found["ExtrapolatedSGD, extrapolation 0"]["of_adamw"] == pytest.approx(0.5, abs=0.01)
    assert found["SIFT, 1 % of the entries"]["of_adamw"] <= 0.05
    for rank in (32, 128):
        row = found[f"AdaRankGrad, rank {rank}"]
        assert row["peak"] == pytest.approx(row["galore"], rel=0.02)
    assert all(r["ratio"] > 0 for r in found.values())
    assert torch.get_num_threads() == 1
