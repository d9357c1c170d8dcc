"""The folder of a run's checkpoints: the newest few, the newest good one, whatever has happened to the others."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import adadagrad as ada
from adadagrad.checkpoint import CheckpointStore, load_checkpoint, save_checkpoint
from adadagrad.checkpoint.manifest import NAME, damaged_record
from adadagrad.core.errors import CorruptCheckpoint, InvalidArgument, StepError
from tests.engine.cases import Sizes, make_engine, make_model, train, weights


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path, steps: int = 5, keep: int = 3) -> CheckpointStore:
    store = CheckpointStore(folder, keep)
    for step in range(steps):
        store.save(step, {"x": torch.arange(2000.0) + step, "step": step})
    return store


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    store = filled(tmp_path / "checkpoints", steps=12)
    assert names(store.folder) == ["step-000000009.pt", "step-000000010.pt", "step-000000011.pt"]
    assert store.load_newest()["step"] == 11
    assert CheckpointStore(tmp_path / "nothing").load_newest() is None
    with pytest.raises(InvalidArgument, match="keep_checkpoints must be >= 1, got 0"):
        CheckpointStore(tmp_path, keep=0)


def flipped(data: bytes) -> bytes:
    place = data.index((torch.arange(2000.0) + 4).numpy().tobytes()[8:800]) + 77
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "30 %": lambda data: data[: int(0.3 * len(data))],
    "90 %": lambda data: data[: int(0.9 * len(data))],
    "99.9 %": lambda data: data[: int(0.999 * len(data))],
    "one bit": flipped,
    "another file": lambda data: b"hello" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_passed_over(damage: str, tmp_path: Path) -> None:
    store = filled(tmp_path)
    newest = store.paths()[0]
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    with pytest.warns(UserWarning, match=r"step-000000004\.pt .*going back to the one before it"):
        content = store.load_newest()
    assert content["step"] == 3
    assert torch.equal(content["x"], torch.arange(2000.0) + 3)


def test_all_damaged_is_an_error_and_not_a_new_run(tmp_path: Path) -> None:
    store = filled(tmp_path)
    for path in store.paths():
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="going back"),
        pytest.raises(CorruptCheckpoint, match="none of the 3 checkpoints in"),
    ):
        store.load_newest()


def test_the_manifest_finds_what_a_checksum_of_32_bits_might_not(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_checkpoint(path, {"x": torch.arange(10.0)})
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(NAME))
        manifest = json.loads(archive.read(name))
        assert set(manifest) == set(archive.namelist()) - {name}
        records = {name: archive.read(name) for name in archive.namelist()}
    data = next(name for name in records if name.endswith("data/0"))
    records[data] = bytes([records[data][0] ^ 1]) + records[data][1:]
    with zipfile.ZipFile(path, "w") as archive:  # as if the damage had come before the checksums were made
        for name, record in records.items():
            archive.writestr(name, record)
    assert damaged_record(path) == data
    with pytest.raises(CorruptCheckpoint, match=r"state\.pt is damaged"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            if name != data:
                archive.writestr(name, record)
    assert damaged_record(path) == data  # missing


def engine(folder: Path, **options: Any) -> Any:
    model = make_model(0.3)
    return make_engine(
        model,
        torch.optim.Adagrad(model.parameters(), lr=0.05),
        policy=Sizes(),
        log_dir=folder,
        total_samples=500,
        **{"checkpoint_every": 40, **options},
    )


def test_a_script_that_resumes_can_be_started_again_and_again(tmp_path: Path) -> None:
    whole = engine(tmp_path / "whole")
    assert not whole.resume()
    train(whole)
    draw, starts = random.Random(0), 0
    while True:
        torch.manual_seed(starts)
        part = engine(tmp_path / "parts", keep_checkpoints=2)
        found = part.resume()
        assert found == (starts > 1)  # the first attempt ends before anything is saved
        starts += 1
        train(part, steps=1 if starts == 1 else draw.randrange(3, 8))
        if part.samples_seen == 500:
            break
    assert starts > 4
    assert torch.equal(weights(part.model), weights(whole.model))
    left, right = (log_of(tmp_path / name) for name in ("whole", "parts"))
    assert left == right
    assert len(names(tmp_path / "parts" / "checkpoints")) == 2


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "seconds", "measure_seconds")} for line in lines]


def test_what_cannot_be_resumed_says_so(tmp_path: Path) -> None:
    nowhere = make_engine(make_model())
    with pytest.raises(InvalidArgument, match="resume needs log_dir"):
        nowhere.resume()
    with pytest.raises(InvalidArgument, match="checkpoint needs log_dir"):
        nowhere.checkpoint()
    begun = engine(tmp_path, checkpoint_every=None)
    train(begun, steps=2)
    with pytest.raises(StepError, match="after the first step"):
        begun.resume()
    for step in begun:
        with pytest.raises(StepError, match="save after"):
            begun.checkpoint()
        step.run(lambda batch: ada.engine and begun.model(batch[0]).square().mean())
        step.update()
        break
