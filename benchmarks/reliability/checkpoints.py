"""Tests 10, 11 and 12: what a crash or a bad disk can do to checkpoints, and what is found of it before use."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch

from adadagrad.checkpoint import CheckpointStore, load_checkpoint
from adadagrad.core.errors import CorruptCheckpoint
from benchmarks.reliability.figure import Figure
from tests.engine.cases import make_engine, make_model, train

CALLS = (
    "adadagrad.checkpoint.file.torch.save",
    "adadagrad.checkpoint.file.seal",
    "adadagrad.checkpoint.file.os.open",
    "adadagrad.checkpoint.file.os.fsync",
    "adadagrad.checkpoint.file.os.close",
    "pathlib.Path.mkdir",
    "pathlib.Path.open",
    "pathlib.Path.replace",
    "pathlib.Path.unlink",
)
"""What a save asks of the system, in whatever order; each call of each is made to fail once, before and after it."""


class _Crash(BaseException):
    """What nothing catches."""


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
    with tempfile.TemporaryDirectory() as name:
        engine = make_engine(make_model(0.3), log_dir=name, checkpoint_every=40)
        train(engine)
        paths = sorted(Path(name).glob("checkpoints/*.pt"))
        good = sum(_loads_without_allowances(path) for path in paths)
        share = 100.0 * good / len(paths)
        yield Figure(
            test=12, name="% load with weights_only=True, no allow-list", value=share, comparison="==", bar=100
        )


def some_state() -> dict[str, Any]:
    """Return what a run saves."""
    model = make_model(0.3)
    engine: Any = make_engine(model, torch.optim.Adam(model.parameters()))
    train(engine, steps=3)
    return {"engine": engine.state_dict()}


def faults(content: dict[str, Any]) -> Iterator[Figure]:
    """Yield what becomes of a checkpoint when the next save fails, at each of its calls."""
    injected = lost = older = 0
    for error in (OSError("no space left on device"), _Crash()):
        for when in ("before", "after"):
            k = 0
            while True:
                with tempfile.TemporaryDirectory() as name:
                    store = CheckpointStore(name, keep=1)
                    store.save(1, content)
                    if not _fails(store, content, error, k, when):
                        break
                    injected, k = injected + 1, k + 1
                    found = _newest(store)
                    lost += found is None
                    older += found is not None and "second" not in found
    yield Figure(test=10, name="calls of a save that were made to fail", value=injected, comparison=">=", bar=20)
    yield Figure(test=10, name="after which no checkpoint could be loaded", value=lost, bar=0)
    yield Figure(test=10, name="after which the one before was loaded", value=older, comparison=">=", bar=10)


def _fails(store: CheckpointStore, content: dict[str, Any], error: BaseException, k: int, when: str) -> bool:
    """Save with the k-th call failing; return whether there were so many calls."""
    count = 0

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == k + 1 and when == "before":
                raise error
            result = call(*arguments, **named)
            if count == k + 1:
                raise error
            return result

        return wrapped

    with ExitStack() as stack:
        for name in CALLS:
            target, attribute = name.rsplit(".", 1)
            stack.enter_context(patch(name, wrap(_resolve(target, attribute))))
        try:
            store.save(2, {**content, "second": True})
        except (OSError, _Crash):
            return True
    return count > k


def _resolve(target: str, attribute: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(resolve_name(target), attribute)
    return found


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
    for damaged in kinds.values():
        newest.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = store.load_newest()
        if found is not None and "first" not in found:  # it was loaded: then it must hold what was saved
            harmless += _same(found, content)
            continue
        detected += 1
        recovered += found is not None and any(newest.name in str(warning.message) for warning in caught)
    name = f"of {len(kinds)} damaged files detected, or loaded with every value as it was saved"
    yield Figure(test=11, name=name, value=detected + harmless, comparison="==", bar=len(kinds))
    yield Figure(test=11, name="detected and recovered from, by name", value=recovered, comparison="==", bar=detected)
    name = "loaded as saved: the bit was in bytes that nobody reads (reported)"
    yield Figure(test=11, name=name, value=harmless, bar=float("inf"))


def _same(found: Any, saved: Any) -> bool:
    """Return whether a loaded value is a saved one."""
    if isinstance(saved, dict):
        return all(key in found and _same(found[key], value) for key, value in saved.items())
    if isinstance(saved, list | tuple):
        return len(found) == len(saved) and all(_same(a, b) for a, b in zip(found, saved, strict=True))
    if isinstance(saved, torch.Tensor):
        return torch.equal(found, saved)
    return bool(found == saved)


def _loads_without_allowances(path: Path) -> bool:
    content = torch.load(path, weights_only=True)
    return isinstance(content, dict) and _same(load_checkpoint(path), content)
