"""Flower, imported once with its telemetry off, and without the warnings that its own dependencies raise on import."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
if find_spec("flwr") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # typer's use of click, on which the tests' settings would fail
        import flwr.serverapp.strategy  # noqa: F401
    from flwr.supercore.task_identity import TaskIdentity

    # What Flower's runtimes set before an app runs, and without which no message can be made.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
