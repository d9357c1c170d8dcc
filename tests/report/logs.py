"""Logs of runs that never happened, with numbers that are easy to check by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any


def start(**changes: Any) -> dict[str, Any]:
    record = {
        "kind": "start",
        "version": 1,
        "library": "0.1.0",
        "torch": "2.13.0",
        "seed": 0,
        "dataset_size": 100,
        "total_samples": 96,
        "policy": "NormTest(eta=0.5)",
        "estimator": "PerExample()",
        "optimizer": "Adagrad",
        "parameters": 10,
        "samples_seen": 0,
        "time": 1.7e9,
    }
    return record | changes


def step(number: int, seen: int, size: int, **changes: Any) -> dict[str, Any]:
    record = {
        "kind": "step",
        "step": number,
        "samples_seen": seen,
        "samples_drawn": seen,
        "global_batch_size": size,
        "loss": 1.0,
        "lr": 0.1,
        "measured": False,
        "reason": "hold",
        "seconds": number / 10,
        "measure_seconds": number / 100,
    }
    return record | changes


def log(number: int, seen: int, accuracy: float, name: str = "val/accuracy", **changes: Any) -> dict[str, Any]:
    record = {"kind": "log", "samples_seen": seen, "step": number, "seconds": number / 10}
    return record | {"metrics": {name: accuracy}} | changes


def end(number: int, seen: int) -> dict[str, Any]:
    return {"kind": "end", "samples_seen": seen, "steps": number, "seconds": number / 10, "measure_seconds": 0.04}


def write(directory: Path, records: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "run.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def small_run() -> list[dict[str, Any]]:
    """Batches 16, 16, 32, 32: mean 24, 96 samples, accuracies 0.5, 0.75, 0.625."""
    measured = {"measured": True, "noise_scale": 40.0, "relative_variance": 0.5, "threshold": 0.25}
    return [
        start(),
        step(1, 16, 16, **measured),
        step(2, 32, 16, **measured | {"noise_scale": "inf", "relative_variance": "nan"}),
        log(2, 32, 0.5),
        step(3, 64, 32),
        log(3, 64, 0.75),
        step(4, 96, 32),
        log(4, 96, 0.625),
        end(4, 96),
    ]


def long_run(size: int, total: int = 70_000, eta: float | None = None, speed: float = 1.0) -> list[dict[str, Any]]:
    """A run that looks like a real one, growing by the norm test where `eta` is given."""
    noise = random.Random(size)
    records = [start(total_samples=total)]
    number, seen, seconds, measuring, due = 0, 0, 0.0, 0.0, 0
    while seen < total:
        size = min(size, total - seen)
        number, seen, seconds = number + 1, seen + size, seconds + speed * (3e-4 + size * 3e-6)
        measured = {}
        requested = size
        if eta is not None and number % 5 == 0:
            measuring += speed * 2e-4
            scale = 20 + seen / 60
            ratio = scale / size * math.exp(noise.gauss(0, 0.5)) / (1 + scale / size)
            requested = max(size, min(600, math.ceil(size * ratio / eta**2)))
            measured = {"measured": True, "relative_variance": ratio, "threshold": eta**2, "noise_scale": scale}
        records.append(step(number, seen, size, seconds=seconds, measure_seconds=measuring, **measured))
        size = requested
        if seen >= due:
            accuracy = 0.97 - 0.85 * math.exp(-number / 150 - seen / 9000) + noise.gauss(0, 0.003)
            records.append(log(number, seen, accuracy, seconds=seconds))
            due += total // 30
    return [*records, end(number, seen)]
