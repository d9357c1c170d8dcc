"""What the progress line says, live and plain."""

from __future__ import annotations

import io
import math
import sys

import pytest

from adadagrad.cli.progress import LiveProgress, PlainProgress, progress_display
from adadagrad.core.errors import MissingExtra
from adadagrad.core.records import BatchPlan, Decision, GradientStatistics, Observation


def decision(seen: int, size: int = 8, measured: bool = False, loss: float | None = 0.5) -> Decision:
    plan = BatchPlan(global_batch_size=size, micro_batch_size=size, accumulation_steps=1)
    gradient = GradientStatistics(num_examples=8, grad_norm_sq=2.0, variance_trace=8.0) if measured else None
    return Decision(
        step=seen // size,
        samples_seen=seen,
        progress=seen,
        observation=Observation(gradient=gradient, loss=loss, samples_seen=seen),
        requested=None,
        plan=plan,
        next_plan=plan,
        lr=0.1,
        reason="hold",
    )


def test_plain_lines_come_at_quarters() -> None:
    stream = io.StringIO()
    progress = PlainProgress("norm", 80, stream=stream)
    progress.interval = 0.0
    for seen in range(8, 88, 8):
        progress.step(decision(seen, measured=seen == 16))
        progress.evaluated({"val/accuracy": 0.75, "val/loss": 1.0}, 0.0)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["30%", "50%", "80%", "100%"]
    for word in ("norm", "batch     8", "noise      8", "loss 0.5000", "acc 0.750", "samples/s", "ETA 0:00"):
        assert word in lines[-1]


def test_a_last_step_beyond_the_budget_leaves_no_time() -> None:
    """Under a rate that counts progress itself, the last step may go further than the budget."""
    stream = io.StringIO()
    progress = PlainProgress("norm", 80, stream=stream)
    progress._started -= 1000.0
    progress.step(decision(88))
    assert "ETA 0:00" in stream.getvalue()


def test_a_resumed_run_counts_its_own_samples_only() -> None:
    stream = io.StringIO()
    progress = PlainProgress("norm", 80, progress=60, stream=stream)
    progress._started -= 1.0
    progress.step(decision(80))
    rate = float(stream.getvalue().split("acc -")[1].split()[0])
    assert 15 <= rate <= 20


def test_evaluating_slows_the_time_left_but_not_the_speed() -> None:
    stream = io.StringIO()
    progress = PlainProgress("norm", 100, stream=stream)
    progress._started -= 10.0
    progress.evaluated({"val/accuracy": 0.75}, seconds=9.0)
    progress.step(decision(40))
    line = stream.getvalue()
    assert 36 <= float(line.split("acc 0.750")[1].split()[0]) <= 40
    assert "ETA 0:15" in line


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_loss_that_is_no_number_can_be_shown(loss: float | None) -> None:
    stream = io.StringIO()
    PlainProgress("norm", 8, stream=stream).step(decision(8, loss=loss))
    assert "loss" in stream.getvalue()


def test_live_line_is_drawn_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    progress = LiveProgress("norm", 16)
    progress.step(decision(8, measured=True))
    progress.step(decision(16))
    progress.close()
    assert "norm" in stream.getvalue()


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_live_display_says_everything_at_any_width(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """A line that is cut at the right edge loses the time left, which is what most people look for."""
    pytest.importorskip("rich")
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    progress = LiveProgress("constant-512", 16)
    progress.evaluated({"val/accuracy": 0.75}, 0.0)
    progress.step(decision(16, measured=True))
    progress.close()
    shown = " ".join(stream.getvalue().split())
    for word in ("100%", "batch 8", "noise 8", "loss 0.5000", "acc 0.750", "samples/s", "ETA 0:00"):
        assert word in shown
    assert "…" not in shown


def test_display_fits_where_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress_display("norm", 8), PlainProgress)
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = progress_display("norm", 8)
    assert isinstance(progress, LiveProgress)
    progress.close()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingExtra, match=r"rich is not installed: pip install 'adadagrad\[cli\]'"):
        progress_display("norm", 8)
