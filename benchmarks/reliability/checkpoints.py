"""Tests 10, 11 and 12: what a crash or a bad disk can do to checkpoints, and what is found of it before use."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

import adadagrad as ada
from adadagrad.checkpoint import CheckpointStore, load_checkpoint
from adadagrad.core.errors import CorruptCheckpoint
from benchmarks.reliability.failing_disk import FailingDisk, How
from benchmarks.reliability.figure import Figure
from tests.engine.cases import make_engine, make_model, train

WAYS: tuple[How, ...] = ("refused", "full", "reported late", "death before", "death within", "death after")

"""How a save is stopped."""

RUNS: tuple[dict[str, Any], ...] = (
    {},
    {"policy": ada.GradientNoiseScale(), "measure": ada.Measure(estimator=ada.MicroBatch(), every=1)},
    {"lr_schedule": ada.CosineSchedule(warmup_samples=100), "policy": ada.StagedBatch("0:7 100:64")},
    {"grad_scaler": torch.amp.GradScaler("cpu", init_scale=2.0**8)},
)
"""What is different between runs, and so between what they save."""


def figures(reduced: bool) -> Iterator[Figure]:
    """Yield the figures of tests 10 to 12.

    Args:
        reduced: Fewer flipped bits.

    Yields:
        One figure after the other.
    """
    content = some_state()
    yield from faults(content)
    with tempfile.TemporaryDirectory() as name:
        yield from damage(Path(name), content, 20 if reduced else 400)
    paths, good = 0, 0
    for options in RUNS:
        with tempfile.TemporaryDirectory() as name:
            model = make_model(0.3)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            train(make_engine(model, optimizer, log_dir=name, checkpoint_every=40, keep_checkpoints=99, **options))
            results = [_loads_without_allowances(path) for path in Path(name).glob("checkpoints/*.pt")]
            paths, good = paths + len(results), good + sum(results)
    name = f"% of {paths} checkpoints of {len(RUNS)} kinds of runs load with weights_only=True, no allow-list"
    yield Figure(test=12, name=name, value=100.0 * good / paths, comparison="==", bar=100)


def some_state() -> dict[str, Any]:
    """Return what a run saves."""
    model = make_model(0.3)
    engine: Any = make_engine(model, torch.optim.Adam(model.parameters()))
    train(engine, steps=3)
    return {"engine": engine.state_dict()}


def faults(content: dict[str, Any]) -> Iterator[Figure]:
    """Yield what becomes of a checkpoint when the next save fails at each of its calls, in each way.

    The next one is of a later step, which deletes the one before, or of the same step, which replaces it.

    Args:
        content: What is saved.

    Yields:
        The figures of test 10.
    """
    found: Counter[str] = Counter()
    for step in (2, 1):
        for how in WAYS:
            for k in count():
                with tempfile.TemporaryDirectory() as name:
                    store = CheckpointStore(name, keep=1)
                    store.save(1, content)
                    with FailingDisk(k, how) as disk:
                        outcome = _outcome(store, step, content, disk)
                    if not disk.failed:
                        break
                    loads = _what_loads(store, content)
                    found.update(("stopped", outcome, loads))
                    found["lost"] += outcome == "saved" and loads == "before"
                    store.save(3, content)
                    left = [path.name for path in Path(name).iterdir()]
                    found["left over"] += left != ["step-000000003.pt"]
    made = ", ".join(f"{times} {kind}" for kind, times in sorted(disk.calls.items()))
    name = f"stops of a save, at each of its calls ({made})"
    yield Figure(test=10, name=name, value=found["stopped"], comparison=">=", bar=100)
    yield Figure(test=10, name="after which nothing loads, or not what was saved", value=found["lost"], bar=0)
    name = "after which the checkpoint before it loads, value for value"
    yield Figure(test=10, name=name, value=found["before"], comparison=">=", bar=50)
    yield Figure(test=10, name="failures of the disk that were another error than OSError", value=found["odd"], bar=0)
    yield Figure(test=10, name="after which the next save left something over", value=found["left over"], bar=0)


def _outcome(store: CheckpointStore, step: int, content: dict[str, Any], disk: FailingDisk) -> str:
    """Save, and say how that ended."""
    try:
        store.save(step, {**content, "second": True})
    except OSError:
        return "as it should"
    except BaseException:
        return "as it should" if disk.dead else "odd"
    return "saved"


def _what_loads(store: CheckpointStore, content: dict[str, Any]) -> str:
    """Return which checkpoint is found: the one before, the new one, or none that is what was saved."""
    found = _newest(store)
    if found is None:
        return "lost"
    new = found.pop("second", False)
    return ("new" if new else "before") if _is_saved(found, content) else "lost"


def _newest(store: CheckpointStore) -> dict[str, Any] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return store.load_newest()
        except CorruptCheckpoint:
            return None


def damage(folder: Path, content: dict[str, Any], flips: int) -> Iterator[Figure]:
    """Yield how many kinds of damage are found, and recovered from with a warning that names the file."""
    store = CheckpointStore(folder, keep=2)
    store.save(1, {**content, "first": True})
    store.save(2, content)
    newest, whole = store.paths()[0], store.paths()[0].read_bytes()
    choose = random.Random(0)
    kinds: dict[str, bytes] = {"empty": b"", "another file": b"not a checkpoint" * 99}
    for share in (0.3, 0.9, 0.999):
        kinds[f"truncated at {share:.1%}"] = whole[: round(share * len(whole))]
    for number in range(flips):
        position, bit = choose.randrange(len(whole)), choose.randrange(8)
        flipped = bytearray(whole)
        flipped[position] ^= 1 << bit
        kinds[f"flipped {number}"] = bytes(flipped)
    detected = recovered = harmless = 0
    for kind, damaged in kinds.items():
        newest.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = store.load_newest()
        if found is not None and "first" not in found:  # it was loaded: then it must hold what was saved
            harmless += kind.startswith("flipped") and _is_saved(found, content)
            continue
        detected += 1
        recovered += found is not None and any(newest.name in str(warning.message) for warning in caught)
    name = f"of {len(kinds)} damaged files detected, or loaded with every value as it was saved"
    yield Figure(test=11, name=name, value=detected + harmless, comparison="==", bar=len(kinds))
    yield Figure(test=11, name="detected and recovered from, by name", value=recovered, comparison="==", bar=detected)
    name = "loaded as saved: the bit was in bytes that nobody reads (reported)"
    yield Figure(test=11, name=name, value=harmless, bar=float("inf"))


def _is_saved(found: dict[str, Any], content: dict[str, Any]) -> bool:
    """Return whether what was loaded is what was saved, and no more than that."""
    return _same({key: value for key, value in found.items() if key != "version"}, content)


def _same(found: Any, saved: Any) -> bool:
    """Return whether a loaded value is a saved one, bit for bit."""
    if type(found) is not type(saved):
        return False
    if isinstance(saved, dict):
        return found.keys() == saved.keys() and all(_same(found[key], value) for key, value in saved.items())
    if isinstance(saved, list | tuple):
        return len(found) == len(saved) and all(_same(a, b) for a, b in zip(found, saved, strict=True))
    if isinstance(saved, torch.Tensor):
        return found.dtype == saved.dtype and torch.equal(found, saved)
    return bool(found == saved) or (saved != saved and found != found)


def _loads_without_allowances(path: Path) -> bool:
    content = torch.load(path, weights_only=True)
    return isinstance(content, dict) and _same(load_checkpoint(path), content)
