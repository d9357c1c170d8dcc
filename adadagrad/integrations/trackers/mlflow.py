"""MLflow, on a server or in an SQLite file; its "step" axis is samples seen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from adadagrad.core.checks import check_at_least
from adadagrad.core.errors import InvalidArgument, MissingExtra
from adadagrad.integrations.trackers.metrics import STEP

KEY = "adadagrad.run_key"
"""The tag by which a run is found again."""
MOST = 1000
"""Numbers that MLflow takes at once."""


class MLflow:
    """Logs to a run of MLflow. Numbers go in bundles, because each call takes some 20 ms.

    Args:
        experiment: Name of the experiment, made where it is missing.
        tracking_uri: A server, or for example ``sqlite:///mlflow.db``; None takes what MLflow is set to, such as
            ``MLFLOW_TRACKING_URI``.
        run_name: As MLflow shows it; None lets MLflow choose.
        run_key: A word that names the run for good: a tracker with the same one continues it. None makes a new run.
        config: Settings, kept as the parameters of a new run; a run that is continued keeps those that it has.
        flush_seconds: Longest time for which numbers are kept back; 0 sends each at once.

    Raises:
        MissingExtra: mlflow is not installed.
        InvalidArgument: `flush_seconds` is negative, or MLflow refuses.
    """

    def __init__(
        self,
        experiment: str,
        *,
        tracking_uri: str | None = None,
        run_name: str | None = None,
        run_key: str | None = None,
        config: Mapping[str, Any] | None = None,
        flush_seconds: float = 5.0,
    ) -> None:
        check_at_least(0, flush_seconds=flush_seconds)
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise MissingExtra("mlflow", "mlflow") from error
        self._metric, self._flush_seconds = Metric, flush_seconds
        try:
            self._client = MlflowClient(tracking_uri=tracking_uri)
            self.run_id = self._open(experiment, run_name, run_key, config or {})
        except MlflowException as error:
            reason = str(error).splitlines()[0]
            raise InvalidArgument(f"MLflow refuses: {reason}: check tracking_uri and experiment") from error
        self._kept: list[Any] = []
        self._flushed = time.monotonic()
        self._closed = False

    def log(self, metrics: Mapping[str, float], *, samples_seen: int, step: int) -> None:
        """Take numbers in, and send those that have waited.

        Args:
            metrics: By name. MLflow keeps an infinity as the largest number that there is.
            samples_seen: The place on the axis.
            step: Logged as a number of its own.
        """
        now = round(1000 * time.time())
        self._kept += [
            self._metric(name, value, now, samples_seen) for name, value in {**metrics, STEP: float(step)}.items()
        ]
        if len(self._kept) >= MOST or time.monotonic() - self._flushed >= self._flush_seconds:
            self._flush()

    def close(self) -> None:
        """Send what is kept back, and say that the run is finished."""
        if not self._closed:
            self._closed = True
            self._flush()
            self._client.set_terminated(self.run_id)

    def _flush(self) -> None:
        for first in range(0, len(self._kept), MOST):
            self._client.log_batch(self.run_id, self._kept[first : first + MOST])
        self._kept, self._flushed = [], time.monotonic()

    def _open(self, experiment: str, run_name: str | None, run_key: str | None, config: Mapping[str, Any]) -> str:
        """Return the identifier of the run: that with the key, or a new one."""
        found = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if found is None else found.experiment_id
        tags = {} if run_key is None else {KEY: run_key.replace("'", "")}
        if tags:
            before = self._client.search_runs([place], f"tags.`{KEY}` = '{tags[KEY]}'", max_results=1)
            if before:
                self._client.update_run(before[0].info.run_id, status="RUNNING")
                return str(before[0].info.run_id)
        run_id = str(self._client.create_run(place, run_name=run_name, tags=tags).info.run_id)
        for name, value in config.items():
            self._client.log_param(run_id, name, value)
        return run_id
