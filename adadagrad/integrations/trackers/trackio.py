"""trackio, a tracker that keeps its runs in a folder of this machine; its "step" axis is samples seen."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from adadagrad.core.errors import MissingExtra
from adadagrad.integrations.trackers.metrics import STEP


class Trackio:
    """Logs to a run of trackio: in the folder ``TRACKIO_DIR``, which is to be set before trackio is first imported.

    Args:
        project: Of trackio.
        name: Of the run; a tracker with the same one continues it. None makes a new run.
        config: Settings to show with the run.
        **options: More for ``trackio.init``, for example ``group``, or ``space_id`` to log to the Hugging Face Hub.

    Raises:
        MissingExtra: trackio is not installed.
    """

    def __init__(
        self, project: str, *, name: str | None = None, config: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        try:
            import trackio
        except ImportError as error:
            raise MissingExtra("trackio", "trackio") from error
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "resume": "never" if name is None else "allow"}
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(project=project, name=name, config=dict(config or {}), **{**quiet, **options})

    def log(self, metrics: Mapping[str, float], *, samples_seen: int, step: int) -> None:
        """Add numbers to the run.

        Args:
            metrics: By name; what stands before a slash groups the charts.
            samples_seen: The place on the axis.
            step: Logged as a number of its own.
        """
        self._run.log({**metrics, STEP: step}, step=samples_seen)

    def close(self) -> None:
        """Finish the run, waiting until all of it is kept."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()  # type: ignore[no-untyped-call]
