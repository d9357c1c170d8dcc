"""Results of runs that nobody trained, so that a study's choices and tables can be tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks.reproduce import study
from benchmarks.runs import Config


def made_up(config: Config, metric: float | None = 0.5, **numbers: Any) -> dict[str, Any]:
    """A run's result: every number is its seed, the curve has four points, from a loss of 2 down to 0.5."""
    names = ("loss", "accuracy", "train_loss", "steps", "samples", "mean_batch", "cpu_seconds", "measuring_seconds")
    quarters = [config.task.budget * k // 4 for k in range(1, 5)]
    return {
        **{name: getattr(config, name) for name in ("lr", "method", "seed", "split")},
        **dict.fromkeys(names, float(config.seed)),
        "metric": metric,
        "diverged": metric is None,
        "curve": [(2 * at, k, float(k), 2 / k) for k, at in enumerate(quarters, 1)],
        "progress": quarters,
        **numbers,
    }


def pretend(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[Config], dict[str, Any]] = made_up
) -> list[tuple[str, Config]]:
    """Make studies take made-up results, and return the runs that they ask for, with the folder, as they come."""
    asked: list[tuple[str, Config]] = []

    def run_all(configs: Sequence[Config], folder: str, jobs: int, out: str) -> list[dict[str, Any]]:
        asked.extend((out, config) for config in configs)
        return [make(config) for config in configs]

    monkeypatch.setattr(study, "run_all", run_all)
    return asked
