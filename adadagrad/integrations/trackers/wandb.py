"""Weights & Biases; samples seen are made the x axis of every chart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adadagrad.core.errors import InvalidArgument, MissingExtra
from adadagrad.integrations.trackers.metrics import STEP

AXIS = "samples_seen"


class WandB:
    """Logs to a run of W&B, on its server or, with ``mode="offline"`` or ``WANDB_MODE=offline``, to files.

    Args:
        project: Of W&B.
        run_id: A word that names the run for good: a tracker with the same one continues it. None makes a new run.
        config: Settings to show with the run.
        **options: More for ``wandb.init``, for example ``name``, ``dir``, ``mode``, ``group``.

    Raises:
        MissingExtra: wandb is not installed.
        InvalidArgument: W&B refuses, for example because nobody has logged in.
    """

    def __init__(
        self, project: str, *, run_id: str | None = None, config: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "wandb") from error
        again = {} if run_id is None else {"id": run_id, "resume": "allow"}
        try:
            self._run = wandb.init(
                project=project, config=dict(config or {}), **{"reinit": "create_new", **again, **options}
            )
        except wandb.Error as error:
            raise InvalidArgument(
                f"wandb.init refuses: {error}: log in with wandb login, or set WANDB_MODE=offline"
            ) from error
        self._run.define_metric(AXIS, hidden=True)
        self._run.define_metric("*", step_metric=AXIS)

    def log(self, metrics: Mapping[str, float], *, samples_seen: int, step: int) -> None:
        """Add a row to the run's history.

        Args:
            metrics: By name; what stands before a slash groups the charts.
            samples_seen: The place on the axis.
            step: Logged as a number of its own.
        """
        self._run.log({**metrics, STEP: step, AXIS: samples_seen})

    def close(self) -> None:
        """Finish the run, waiting until W&B has all of it."""
        self._run.finish()
