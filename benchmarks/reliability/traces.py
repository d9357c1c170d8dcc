"""Tests 18 and 19: the same run again gives the same log, and the log that it gave when this file was written.

``python -m benchmarks.reliability.traces`` writes the golden traces anew, after a change that is meant to move them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from benchmarks.reliability.figure import Figure
from tests.engine.cases import make_engine, make_model, read_log, train
from tests.ranks import on_ranks

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "traces.json"
"""Traces by name: batch size, request and loss of each step."""

TESTS: dict[str, Any] = {
    "norm": ada.NormTest(eta=0.5),
    "inner product": ada.InnerProductTest(theta=0.3),
    "augmented": ada.AugmentedInnerProductTest(theta=0.5, nu=1.5),
    "coordinate": ada.CoordinateNormTest(eta=0.7, reduction="blocks"),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "AdaGradNorm": lambda params: ada.AdaGradNorm(params, lr=0.5),
}

Trace = dict[str, list[float]]


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of tests 18 and 19.

    Args:
        reduced: One policy in place of four in test 18.

    Yields:
        One figure after the other.
    """
    names = list(TESTS)[:1] if reduced else list(TESTS)
    differ = sum(repeated(name) for name in names)
    yield Figure(test=18, name="lines of run.jsonl that differ, one process", value=differ, comparison="==", bar=0)
    differ = sum(on_ranks(2, of_rank, names))
    yield Figure(test=18, name="lines of run.jsonl that differ, 2 ranks", value=differ, comparison="==", bar=0)
    golden: dict[str, Trace] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for name, found in traces().items():
        yield Figure(test=19, name=f"apart from the golden trace, {name}", value=apart(found, golden[name]), bar=1e-6)


def repeated(name: str, *, wrapped: bool = False) -> int:
    """Return how many lines of the logs of two equal runs differ, times aside; with dropout and all that is random.

    Args:
        name: Of the policy.
        wrapped: Whether the model is in DistributedDataParallel.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    logs = []
    try:
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                model = make_model(dropout=0.3)
                whole = DistributedDataParallel(model) if wrapped else model
                optimizer = OPTIMIZERS["Adagrad"](model.parameters())
                measure = ada.Measure(every=1, max_examples=None)
                train(make_engine(whole, optimizer, policy=TESTS[name], measure=measure, log_dir=folder))
                logs.append(read_log(Path(folder)) if (Path(folder) / "run.jsonl").exists() else [])
    finally:
        torch.use_deterministic_algorithms(before)
    assert wrapped or len(logs[0]) > 5
    return sum(a != b for a, b in zip(*logs, strict=True)) if len(logs[0]) == len(logs[1]) else max(map(len, logs))


def of_rank(rank: int, names: list[str]) -> int:
    """Run test 18 on a rank; the first one has the log."""
    return sum(repeated(name, wrapped=True) for name in names)


def traces() -> dict[str, Trace]:
    """Return what every test does under every optimizer, by name."""
    return {f"{test}, {optimizer}": trace(test, optimizer) for test in TESTS for optimizer in OPTIMIZERS}


def trace(test: str, optimizer: str) -> Trace:
    """Return batch size, request and loss of each step of a small run in float64."""
    model = make_model()
    measure = ada.Measure(every=1, max_examples=None)
    decisions = train(
        make_engine(model, OPTIMIZERS[optimizer](model.parameters()), policy=TESTS[test], measure=measure)
    )
    return {
        "size": [float(d.observation.global_batch_size or 0) for d in decisions],
        "requested": [d.requested if d.requested is not None else -1.0 for d in decisions],
        "loss": [d.observation.loss or 0.0 for d in decisions],
    }


def apart(found: Trace, golden: Trace) -> float:
    """Return how far two traces lie apart, relative to the golden one; infinite where their lengths differ."""
    if any(len(found[key]) != len(golden[key]) for key in golden):
        return float("inf")
    pairs = [(a, b) for key in golden for a, b in zip(found[key], golden[key], strict=True)]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(trace)}" for name, trace in traces().items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
