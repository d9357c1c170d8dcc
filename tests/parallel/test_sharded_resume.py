"""Checkpoints of a sharded model: every rank its shards, the same bits again, on any number of ranks."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import adadagrad as ada
from adadagrad.checkpoint import sharded
from adadagrad.core.errors import CorruptCheckpoint
from tests.engine.cases import make_engine, make_model, mean_loss, train, weights
from tests.parallel.sharding import but_biases, layers, whole, whole_weights
from tests.ranks import on_ranks

OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "adagrad-norm": lambda ps: ada.AdaGradNorm(ps, lr=0.05),
}


def build(shard: Any = whole, optimizer: str = "adam", dropout: float = 0.0, **options: Any) -> Any:
    """An engine on a sharded model; on a plain one where `shard` is None."""
    model = make_model(dropout)
    if shard is not None:
        shard(model)
    parameters: Any = model.parameters()
    if shard is but_biases:  # plain and sharded ones do not go together in one group
        kinds: dict[bool, list[Any]] = {}
        for p in model.parameters():
            kinds.setdefault(isinstance(p, DTensor), []).append(p)
        parameters = [{"params": ps} for ps in kinds.values()]
    return make_engine(
        model,
        OPTIMIZERS[optimizer](parameters),
        policy=ada.NormTest(eta=0.7),
        measure=ada.Measure(every=1, max_examples=None),
        global_batch_size=8,
        total_samples=400,
        seed=2,
        **options,
    )


def trace(decisions: list[Any]) -> list[tuple[int, float]]:
    return [(d.plan.global_batch_size, d.observation.loss) for d in decisions]


def every_optimizer(rank: int, folder: str) -> Any:
    found = {}
    for shard in (whole, layers, but_biases):
        for name in OPTIMIZERS:
            reference, expected = build(shard, name, 0.3), []
            for step in reference:
                step.run(mean_loss(reference.model))
                expected += trace([step.update()])
                if reference.steps in (1, 4):
                    reference.save(f"{folder}/{shard.__name__}-{name}-{reference.steps}")
            for k in (1, 4):
                torch.manual_seed(k)
                again = build(shard, name, 0.3)
                again.load(f"{folder}/{shard.__name__}-{name}-{k}")
                same = trace(train(again)) == expected[k:]
                apart = whole_weights(again.model) - whole_weights(reference.model)
                found[shard.__name__, name, k] = same and float(apart.abs().max()) == 0.0
    return found


def test_the_same_bits_again(tmp_path: Path) -> None:
    for found in on_ranks(2, every_optimizer, str(tmp_path)):
        assert len(found) == 24
        assert all(found.values()), found
    folder = tmp_path / "whole-adam-4"
    names = {path.name for path in folder.iterdir()}
    assert {"manifest.json", "engine.pt", ".metadata", "__0_0.distcp", "__1_0.distcp"} == names
    assert set(json.loads((folder / "manifest.json").read_text())) == names - {"manifest.json"}


def part(rank: int, folder: str, steps: int | None) -> Any:
    engine = build(layers, log_dir=folder)
    resumed = engine.resume()
    decisions = trace(train(engine, steps=steps))
    engine.checkpoint()
    return resumed, decisions, whole_weights(engine.model)


def test_on_another_number_of_ranks(tmp_path: Path) -> None:
    plain = build(None)
    expected = trace(train(plain))
    found: list[tuple[int, float]] = []
    for number, (ranks, steps) in enumerate(((2, 3), (1, 2), (4, 3), (2, None))):
        resumed, decisions, w = on_ranks(ranks, part, str(tmp_path), steps)[0]
        assert resumed == (number > 0)
        found += decisions
    assert [size for size, _ in found] == [size for size, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-9)
    assert float((w - weights(plain.model)).abs().max()) < 1e-9
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(kept) == 3
    assert all("." not in name for name in kept)


def from_whole(rank: int, file: str, folder: str) -> Any:
    """A checkpoint of one process goes on sharded, and is saved as shards."""
    engine = build(layers)
    engine.load(file)
    engine.save(folder)
    return trace(train(engine))


def test_from_one_process_to_shards_and_back(tmp_path: Path) -> None:
    plain = build(None)
    train(plain, steps=3)
    plain.save(tmp_path / "plain.pt")
    expected = trace(train(plain))
    sharded = on_ranks(2, from_whole, str(tmp_path / "plain.pt"), str(tmp_path / "sharded"))
    again = build(None)
    again.load(tmp_path / "sharded")
    for found in (*sharded, trace(train(again))):
        assert [size for size, _ in found] == [size for size, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-9)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def flipped(content: bytes, bit: int) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ bit]) + content[middle + 1 :]


DAMAGE = {
    "a missing shard": ("__1_0.distcp", lambda content: None),
    "a missing manifest": ("manifest.json", lambda content: None),
    "a broken manifest": ("manifest.json", lambda content: content[:-9]),
    "a truncated shard": ("__0_0.distcp", lambda content: content[: len(content) * 9 // 10]),
    "an empty index": (".metadata", lambda content: b""),
    "a flipped bit in a shard": ("__0_0.distcp", lambda content: flipped(content, 4)),
    "a flipped bit in the rest": ("engine.pt", lambda content: flipped(content, 1)),
}


def damaged(rank: int, folder: str) -> Any:
    engine = build(layers, log_dir=folder)
    train(engine, steps=2)
    engine.checkpoint()
    train(engine, steps=1)
    engine.checkpoint()
    newest = engine._store.paths()[0]
    found = {}
    for name, (file, change) in DAMAGE.items():
        content = (newest / file).read_bytes()
        dist.barrier()
        if rank == 0:
            worse = change(content)
            (newest / file).unlink() if worse is None else (newest / file).write_bytes(worse)
        dist.barrier()
        again = build(layers, log_dir=folder)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed = again.resume()
        named = any(newest.name in str(warning.message) for warning in caught)
        found[name] = (resumed, again.steps, named)
        dist.barrier()
        (newest / file).write_bytes(content)
        dist.barrier()
    if rank == 0:  # whole, but with an index that would run code
        (newest / ".metadata").write_bytes(pickle.dumps(Evil()))
        (newest / "manifest.json").unlink()
        sharded._seal(newest)
    dist.barrier()
    with pytest.raises(CorruptCheckpoint):
        engine.load(newest)
    return found


def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for found in on_ranks(2, damaged, str(tmp_path)):
        assert found == dict.fromkeys(DAMAGE, (True, 2, True))
    assert "must not run" not in capfd.readouterr().out


def interrupted(rank: int, folder: str) -> Any:
    """What a crash in the middle of a save leaves is no checkpoint, and the next save clears it away."""
    engine = build(layers, log_dir=folder)
    train(engine, steps=1)
    engine.checkpoint()
    train(engine, steps=1)
    if rank == 0:
        left = Path(folder) / "checkpoints" / "step-000000002.tmp"
        left.mkdir()
        (left / "__0_0.distcp").write_bytes(b"half")
    dist.barrier()
    again = build(layers, log_dir=folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed = again.resume()
    steps = again.steps
    engine.checkpoint()
    engine.checkpoint()  # the same step once more
    return resumed, steps, sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    expected = (True, 1, ["step-000000001", "step-000000002"])
    assert on_ranks(2, interrupted, str(tmp_path)) == [expected, expected]


def killed_late(rank: int, folder: str) -> Any:
    """A process killed while the folder that was replaced is deleted leaves it; later saves go on all the same."""
    engine = build(layers)
    path = Path(folder) / "model"
    engine.save(path)
    left = path.with_name("model.old.tmp")
    if rank == 0:
        left.mkdir()
        (left / "__0_0.distcp").write_bytes(b"old")
    dist.barrier()
    train(engine, steps=1)
    engine.save(path)
    again = build(layers)
    again.load(path)
    return again.steps, sorted(entry.name for entry in Path(folder).iterdir())


def test_what_a_replaced_folder_leaves(tmp_path: Path) -> None:
    assert on_ranks(2, killed_late, str(tmp_path)) == [(1, ["model"])] * 2
