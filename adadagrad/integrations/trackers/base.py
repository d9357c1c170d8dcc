"""What a tracker is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """Takes numbers along a run; the x axis is the number of samples seen."""

    def log(self, metrics: Mapping[str, float], *, samples_seen: int, step: int) -> None:
        """Take numbers in.

        Args:
            metrics: By name; NaN and infinities are allowed.
            samples_seen: Where in the run they are, in examples.
            step: The same in optimizer steps.
        """

    def close(self) -> None:
        """Write out what is kept back; nothing is logged afterwards. A second call does nothing."""
