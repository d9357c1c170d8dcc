"""TensorBoard, by the writer that torch brings; its "step" axis is samples seen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from adadagrad.core.errors import MissingExtra
from adadagrad.integrations.trackers.metrics import STEP


class TensorBoard:
    """Writes events that ``tensorboard --logdir`` shows.

    Args:
        log_dir: Folder for this run's events, made where it is missing; runs whose folders lie beside each other are
            shown in one chart. A folder that is written to again is continued.
        flush_seconds: Longest time for which numbers are kept back.

    Raises:
        MissingExtra: tensorboard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str], *, flush_seconds: int = 10) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "tensorboard") from error
        self._writer = SummaryWriter(Path(log_dir), flush_secs=flush_seconds)

    def log(self, metrics: Mapping[str, float], *, samples_seen: int, step: int) -> None:
        """Write numbers.

        Args:
            metrics: By name; what stands before a slash groups the charts.
            samples_seen: The place on the axis.
            step: Written as a number of its own.
        """
        for name, value in {**metrics, STEP: float(step)}.items():
            self._writer.add_scalar(name, value, samples_seen)

    def close(self) -> None:
        """Write out what is kept back."""
        self._writer.close()
