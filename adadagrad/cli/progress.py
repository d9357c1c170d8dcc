"""How a run is going: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from typing import TextIO

from adadagrad.cli.text import clock, fold
from adadagrad.core.errors import MissingExtra
from adadagrad.core.records import Decision

WIDE = 110
"""Columns from which on the live line has room for a bar and for padded numbers that do not jump."""


class AbstractProgress(ABC):
    """Shows batch size, noise scale, loss, samples per second and the time left.

    Args:
        name: The run's name.
        total_samples: The run's budget.
        progress: Where it starts, in examples; more than 0 for a resumed run.
        samples_seen: Examples seen by then; None where that is the progress.
    """

    interval: float = 0.1
    """Seconds between two updates of the display."""

    def __init__(self, name: str, total_samples: int, progress: float = 0, samples_seen: int | None = None) -> None:
        self.name, self.total_samples = name, total_samples
        self._first, self._started = progress, time.monotonic()
        self._samples = progress if samples_seen is None else samples_seen
        self._shown = -math.inf
        self._evaluating = 0.0
        self._noise_scale: float | None = None
        self._metric = "acc -"

    def step(self, decision: Decision) -> None:
        """Take in a step; cheap enough to call at each one.

        Args:
            decision: What `update` returned.
        """
        if decision.observation.gradient is not None:
            self._noise_scale = decision.observation.gradient.noise_scale
        now = time.monotonic()
        if now - self._shown >= self.interval or decision.progress >= self.total_samples:
            self._shown = now
            self.show(min(decision.progress, self.total_samples), self._parts(decision, now))

    def evaluated(self, metrics: dict[str, float], seconds: float) -> None:
        """Take in an evaluation; before the step that it follows, so that the step's line shows it.

        Args:
            metrics: By name, the accuracy first.
            seconds: What it took, which is no part of the training's speed but of the time left.
        """
        self._evaluating += seconds
        self._metric = f"acc {next(iter(metrics.values())):.3f}"

    @abstractmethod
    def show(self, progress: float, parts: list[str]) -> None:
        """Display what is known, in parts such as ``"batch    64"``."""

    @abstractmethod
    def close(self) -> None:
        """End the display; what it showed last stays."""

    def _parts(self, decision: Decision, now: float) -> list[str]:
        done, elapsed = decision.progress - self._first, max(now - self._started, 1e-9)
        rate = (decision.samples_seen - self._samples) / max(elapsed - self._evaluating, 1e-9)
        left = max(self.total_samples - decision.progress, 0.0) * elapsed / done if done > 0 else math.inf
        noise = "-" if self._noise_scale is None else f"{self._noise_scale:,.0f}"
        loss = decision.observation.loss
        return [
            f"batch {decision.plan.global_batch_size:>5,}",
            f"noise {noise:>6}",
            f"loss {math.nan if loss is None else loss:.4f}",
            f"{self._metric:<9}",
            f"{rate:>7,.0f} samples/s",
            f"ETA {clock(left)}",
        ]


class LiveProgress(AbstractProgress):
    """One line that is redrawn in place, by rich; on a narrow terminal as many lines as it takes to say all.

    Args:
        name: The run's name.
        total_samples: The run's budget.
        progress: Where it starts.
        samples_seen: Examples seen by then; None where that is the progress.

    Raises:
        MissingExtra: rich is not installed.
    """

    def __init__(self, name: str, total_samples: int, progress: float = 0, samples_seen: int | None = None) -> None:
        super().__init__(name, total_samples, progress, samples_seen)
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
            from rich.table import Column
        except ImportError as error:
            raise MissingExtra("rich", "cli") from error
        console = Console(stderr=True)
        self._wide = console.width >= WIDE
        title = f"{name:<12}" if self._wide else name
        columns: list[ProgressColumn] = [
            TextColumn("{task.fields[name]}", table_column=Column(no_wrap=True), markup=False),
            TextColumn("{task.percentage:>3.0f}%", table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True), markup=False),
        ]
        if self._wide:
            columns.insert(1, BarColumn(bar_width=10))
        self._room = console.width - len(f"{title} 100% ")
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task = self._progress.add_task("", total=total_samples, completed=int(progress), name=title)
        self._progress.start()

    def show(self, progress: float, parts: list[str]) -> None:
        """Redraw the line."""
        text = "  ".join(parts) if self._wide else fold(parts, self._room)
        self._progress.update(self._task, completed=progress, description=text, refresh=True)

    def close(self) -> None:
        """Leave the last line on the screen."""
        self._progress.stop()


class PlainProgress(AbstractProgress):
    """A line of text now and then: at every quarter of the budget, and at least every 30 seconds.

    Args:
        name: The run's name.
        total_samples: The run's budget.
        progress: Where it starts.
        samples_seen: Examples seen by then; None where that is the progress.
        stream: Where lines go; None is standard error.
    """

    def __init__(
        self,
        name: str,
        total_samples: int,
        progress: float = 0,
        samples_seen: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        super().__init__(name, total_samples, progress, samples_seen)
        self._stream = stream
        self._quarter = 4 * progress // total_samples
        self._printed = time.monotonic()

    def show(self, progress: float, parts: list[str]) -> None:
        """Print the line if it is time."""
        quarter, now = 4 * progress // self.total_samples, time.monotonic()
        if quarter > self._quarter or now - self._printed >= 30:
            self._quarter, self._printed = quarter, now
            percent = math.floor(100 * progress / self.total_samples)
            print(f"{self.name:<12} {percent:>3}%  {'  '.join(parts)}", file=self._stream or sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to end."""


class SilentProgress(AbstractProgress):
    """Nothing at all: for the processes beside the one that speaks."""

    def show(self, progress: float, parts: list[str]) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing to end."""


def progress_display(
    name: str, total_samples: int, progress: float = 0, samples_seen: int | None = None
) -> AbstractProgress:
    """Choose the display that fits standard error: live on a terminal, plain lines elsewhere.

    Args:
        name: The run's name.
        total_samples: The run's budget.
        progress: Where it starts.
        samples_seen: Examples seen by then; None where that is the progress.

    Returns:
        The display, to be closed.
    """
    kind = LiveProgress if sys.stderr.isatty() else PlainProgress
    return kind(name, total_samples, progress, samples_seen)
