"""Where one measured micro-batch is: which forward of the model, which call of which layer, trial run or not.

All patched forwards of a micro-batch share one such state, whatever kind of rule they serve, so that calls are numbered
and trial runs held back in one way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adadagrad.statistics.broadcast import CallKey
from adadagrad.statistics.calibration import Calibration


class ForwardState:
    """The state of one micro-batch before the model's first call; the recorder moves it on."""

    def __init__(self) -> None:
        self.leaf: Tensor | None = None
        """The dummy leaf, float64 (n,); None before the model's first call."""
        self.shared: set[nn.Parameter] = set()
        """Parameters in a call whose examples are not known."""
        self.calibration: Calibration | None = None
        """What makes trial runs, while they are made; it must be told of every layer call in them."""
        self.trial_rows = 0
        """Examples of the trial run in progress; 0 outside one, also in a backward that a trial itself makes."""
        self.depth = 0
        """Of calls of the model; 0 outside its forward, where activation checkpointing repeats calls."""
        self._calls: dict[str, int] = {}  # per module in one forward of the model

    @property
    def between_trials(self) -> bool:
        """Whether trial runs are made, but a call now belongs to none: a trial's own backward repeats a checkpoint."""
        return self.calibration is not None and not self.trial_rows

    @contextmanager
    def trials(self, calibration: Calibration) -> Iterator[None]:
        """Hold everything back while the trial runs are made, also the backwards within them.

        Args:
            calibration: What makes them, and is told of every layer call.

        Yields:
            Nothing.
        """
        self.calibration = calibration
        try:
            yield
        finally:
            self.calibration = None

    @contextmanager
    def trial(self, rows: int) -> Iterator[None]:
        """Let the calibration note the layer calls of one trial run.

        Args:
            rows: Examples in this run.

        Yields:
            Nothing.
        """
        self.trial_rows = rows
        try:
            yield
        finally:
            self.trial_rows = 0

    def run(self, inner: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Return one forward of the model, in which the calls are numbered anew.

        Args:
            inner: The forward.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self._calls.clear()
        self.depth += 1
        try:
            return inner(*args, **kwargs)
        finally:
            self.depth -= 1

    def number(self, name: str) -> CallKey:
        """Return the key of a call that is made now.

        Args:
            name: Qualified name of the module.

        Returns:
            The name, and how many calls the module has had before in this forward.
        """
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        return name, number
