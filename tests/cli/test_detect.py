"""``adadagrad detect``: policies beside each other, the matched share, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from adadagrad.cli import detect as detect_module
from adadagrad.cli import main
from tests.cli.neighbours import page_of, rows_of

for package in ("tyro", "sklearn", "matplotlib", "jinja2"):
    pytest.importorskip(package)

SHORT = ["--steps", "12", "--scenes", "60", "--test-scenes", "10", "--batch", "4"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def detect(*arguments: str, out: str = "run") -> list[dict[str, object]]:
    assert main(["detect", *SHORT, *arguments, "--out", out]) == 0
    return rows_of(Path(out))


def stitched(rows: list[dict[str, object]], policy: str) -> list[object]:
    return [row["stitched"] for row in rows if row["policy"] == policy]


def test_policies_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    rows = detect("--policies", "never", "threshold", "random", "always")
    assert len(rows) == 48
    assert not any(stitched(rows, "never"))
    assert all(stitched(rows, "always"))
    assert stitched(rows, "threshold")[0]
    assert 0 < sum(map(bool, stitched(rows, "threshold"))) < 12
    printed = capsys.readouterr().out
    assert "never      AP small" in printed
    assert "images read 192" in printed  # 12 steps of 16 where all are stitched
    page = page_of(Path("run"))
    assert "Share of box loss on small objects" in page
    assert "Dynamic scale training: never, threshold, random, always" in page


def test_a_threshold_of_0_never_stitches_and_sees_the_same_stream() -> None:
    rows = detect("--policies", "never", "threshold", "--tau", "0")
    by_policy = [[(r["step"], r["loss"]) for r in rows if r["policy"] == name] for name in ("never", "threshold")]
    assert by_policy[0] == by_policy[1]


def test_random_takes_the_share_of_the_threshold_before_it_or_its_own() -> None:
    assert all(stitched(detect("--policies", "random", "--p", "1", out="one"), "random"))
    assert not any(stitched(detect("--policies", "random", "--p", "0", out="none"), "random"))
    rows = detect("--policies", "threshold", "random", "--tau", "2", out="matched")
    assert all(stitched(rows, "threshold"))
    assert all(stitched(rows, "random"))
    other_way = detect("--policies", "random", "threshold", "--tau", "2", out="other")
    assert all(stitched(other_way, "random"))


@pytest.mark.parametrize(
    "arguments",
    [["--lr", "0.01"], ["--seed", "1"], ["--small-scenes", "0.9"], ["--scenes", "90"], ["--batch", "6"]],
    ids=" ".join,
)
def test_a_flag_changes_the_training(arguments: list[str]) -> None:
    one, two = detect("--policies", "never", out="one"), detect("--policies", "never", *arguments, out="two")
    assert [row["loss"] for row in one] != [row["loss"] for row in two]


def test_the_weight_of_the_past_is_read_by_the_smoothed_threshold() -> None:
    one = detect("--policies", "smoothed", "--ema", "0", "--tau", "0.3", out="one")
    assert stitched(one, "smoothed") == stitched(
        detect("--policies", "threshold", "--tau", "0.3", out="t"), "threshold"
    )
    assert stitched(detect("--policies", "smoothed", "--tau", "0.3", out="two"), "smoothed") != stitched(
        one, "smoothed"
    )


def test_no_small_objects_at_all() -> None:
    """The share is 0 in every step, so that the threshold stitches always: shrunk large digits are no small ones."""
    rows = detect("--policies", "threshold", "--small-scenes", "0")
    assert rows[0]["stitched"]


def test_a_loss_that_is_not_finite_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(detect_module, "HIGHEST_RATE", 1e38)
    assert main(["detect", *SHORT, "--policies", "never", "--lr", "1e30", "--out", "run"]) == 2
    assert "under never is not finite: lower --lr" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "sometimes"], "unknown policies 'sometimes'"),
        (["--policies", "never", "never"], "--policies must be different ones"),
        (["--tau", "-1"], "--tau must be >= 0, got -1.0"),
        (["--policies", "smoothed", "--ema", "1"], "--ema must be >= 0 and below 1, got 1.0"),
        (["--p", "2"], "--p must be between 0 and 1, got 2.0"),
        (["--steps", "0"], "--steps must be >= 1, got 0"),
        (["--batch", "0"], "--batch must be >= 1, got 0"),
        (["--lr", "0"], "--lr must be > 0, got 0.0"),
        (["--small-scenes", "2"], "--small-scenes must be between 0 and 1, got 2.0"),
        (["--scenes", "10"], "--batch must be at most a quarter of the scenes, got 8 of 10"),
        (["--policies", "never", "--p", "0.3"], "--p is not used here: leave it out, or choose --policies random"),
        (["--policies", "never", "--tau", "0.3"], "--tau is not used here"),
        (["--ema", "0.3"], "--ema is not used here: leave it out, or choose --policies smoothed"),
        (["--lr", "1e300"], "--lr must be at most 1e+06, got 1e+300"),
        (["--seed", "9" * 25], "--seed must be below 2**63"),
        (["--seed", "-1"], "--seed must be >= 0, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
