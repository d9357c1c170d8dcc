"""Checkpoint files: whole or not at all, checked before use, one typed error that names the file."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch

from adadagrad.checkpoint import VERSION, load_checkpoint, random_states, save_checkpoint, set_random_states
from adadagrad.core.errors import AdadagradError, CorruptCheckpoint

CONTENT = {
    "tensors": [torch.arange(2000, dtype=torch.float64), torch.full((7, 3), 0.1)],
    "numbers": {"a": 1, "b": 2.5, "none": None, "flag": True, 3: "word"},
}


def same(left, right):
    """Whether two contents agree bitwise."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and left == right


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "state.pt", CONTENT)
    return tmp_path / "state.pt"


def test_what_was_saved_is_loaded(path):
    assert same(load_checkpoint(path), {"version": VERSION, **CONTENT})
    assert same(load_checkpoint(str(path)), {"version": VERSION, **CONTENT})
    assert same(torch.load(path, weights_only=True), {"version": VERSION, **CONTENT})


def test_an_older_file_is_replaced_and_folders_are_made(path, tmp_path):
    save_checkpoint(path, {"x": 1})
    assert load_checkpoint(path) == {"version": VERSION, "x": 1}
    save_checkpoint(tmp_path / "a" / "b" / "c.pt", {"x": 2})
    assert load_checkpoint(tmp_path / "a" / "b" / "c.pt")["x"] == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "state.pt"]


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999, -1])
def test_a_truncated_file(path, part):
    data = path.read_bytes()
    path.write_bytes(data[:part] if part == -1 else data[: int(part * len(data))])
    with pytest.raises(CorruptCheckpoint, match=r"state\.pt is not a readable checkpoint.*use an earlier one"):
        load_checkpoint(path)


def test_a_flipped_bit_in_tensor_data(path):
    data = bytearray(path.read_bytes())
    place = data.index(CONTENT["tensors"][0].numpy().tobytes()[8:800]) + 77
    data[place] ^= 4
    path.write_bytes(data)
    assert not same(torch.load(path, weights_only=True)["tensors"], CONTENT["tensors"])  # torch does not notice
    with pytest.raises(CorruptCheckpoint, match=r"state\.pt is damaged \(checksum of .*\): use an earlier one"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_flipped_bit_is_an_error_or_harmless(path):
    """Wherever it falls: what loads is what was saved."""
    data, draw = path.read_bytes(), random.Random(0)
    ends = [*range(400), *range(len(data) - 900, len(data))]
    for place in [*draw.sample(ends, 150), *(draw.randrange(len(data)) for _ in range(100))]:
        broken = bytearray(data)
        broken[place] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        with contextlib.suppress(CorruptCheckpoint):  # and no other error
            assert same(load_checkpoint(path), {"version": VERSION, **CONTENT}), place


NO_CHECKPOINT = {
    "text": lambda path: path.write_text("hello"),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"version": 1})),
    "zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "foreign zip": lambda path: zipped(path, {"a.txt": "hello"}),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "weights": lambda path: torch.save({"weight": torch.ones(3)}, path),
    "odd version": lambda path: torch.save({"version": "1"}, path),
    "forbidden type": lambda path: torch.save({"version": 1, "path": path.parent}, path),
}


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


@pytest.mark.parametrize("name", NO_CHECKPOINT)
def test_a_file_that_is_no_checkpoint(name, tmp_path):
    path = tmp_path / "other.pt"
    NO_CHECKPOINT[name](path)
    with pytest.raises(CorruptCheckpoint, match=r"other\.pt is not a"):
        load_checkpoint(path)


def test_a_missing_file_or_a_folder(tmp_path):
    with pytest.raises(CorruptCheckpoint, match=r"nothing\.pt does not exist: check the path"):
        load_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(CorruptCheckpoint, match="does not exist"):
        load_checkpoint(tmp_path)
    assert issubclass(CorruptCheckpoint, AdadagradError)


def test_a_newer_version(tmp_path):
    torch.save({"version": VERSION + 1, "x": 1}, tmp_path / "new.pt")
    with pytest.raises(CorruptCheckpoint, match=rf"new\.pt has version {VERSION + 1}, .* up to {VERSION}: update"):
        load_checkpoint(tmp_path / "new.pt")


def written_in_part(content, file):
    file.write(b"half of it")
    raise OSError("No space left on device")


CRASHES = {
    "torch.save": (torch, "save", written_in_part),
    "fsync": (os, "fsync", None),
    "manifest": (zipfile.ZipFile, "writestr", None),
    "replace": (Path, "replace", None),
}


@pytest.mark.parametrize("where", CRASHES)
@pytest.mark.parametrize("old", [True, False])
def test_a_crash_while_saving_leaves_the_old_file_and_no_other(where, old, tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    if old:
        save_checkpoint(path, CONTENT)

    def crash(*args, **kwargs):
        raise OSError("No space left on device")

    place, name, replacement = CRASHES[where]
    monkeypatch.setattr(place, name, replacement or crash)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"x": 1})
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == (["state.pt"] if old else [])
    if old:
        assert same(load_checkpoint(path), {"version": VERSION, **CONTENT})
    save_checkpoint(path, {"x": 2})
    assert load_checkpoint(path)["x"] == 2


def test_a_disk_that_fills_up_in_the_middle_of_a_record_is_an_error_of_the_disk(path, monkeypatch):
    opened = Path.open

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 9_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    def full(self, mode="r", *args, **kwargs):
        return io.BufferedWriter(Full(self, "w")) if mode == "wb" else opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"state\.pt could not be written: No space left on device") as error:
        save_checkpoint(path, {**CONTENT, "more": torch.ones(2000)})
    monkeypatch.undo()
    assert error.value.errno == 28
    assert same(load_checkpoint(path), {"version": VERSION, **CONTENT})
    assert len(list(path.parent.iterdir())) == 1


def test_a_file_that_cannot_be_opened_again_is_an_error_of_the_disk(path, monkeypatch):
    opened = io.open

    def refusing(file, mode="r", *args, **kwargs):
        if mode == "r+b":
            raise OSError(24, "Too many open files")
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", refusing)
    with pytest.raises(OSError, match="Too many open files"):
        save_checkpoint(path, {"x": 1})
    monkeypatch.undo()
    assert same(load_checkpoint(path), {"version": VERSION, **CONTENT})
    assert len(list(path.parent.iterdir())) == 1


def test_content_that_cannot_be_saved_leaves_the_old_file(path):
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_checkpoint(path, {"x": lambda: 1})
    assert same(load_checkpoint(path), {"version": VERSION, **CONTENT})
    assert len(list(path.parent.iterdir())) == 1


def test_an_interrupt_while_saving_leaves_the_old_file(path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"x": 1})
    monkeypatch.undo()
    assert same(load_checkpoint(path), {"version": VERSION, **CONTENT})
    assert len(list(path.parent.iterdir())) == 1


def test_random_states_travel_through_a_file(tmp_path):
    import numpy

    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    random.gauss(0, 1)  # leaves a second value cached
    numpy.random.randn()
    save_checkpoint(tmp_path / "random.pt", {"random": random_states()})

    def draw():
        return [
            random.random(),
            random.gauss(0, 1),
            float(numpy.random.rand()),
            float(numpy.random.randn()),
            torch.rand(3).tolist(),
            torch.randn(2).tolist(),
        ]

    expected = draw()
    random.seed(2)
    numpy.random.seed(2)
    torch.manual_seed(2)
    set_random_states(load_checkpoint(tmp_path / "random.pt")["random"])
    assert draw() == expected


def test_a_state_without_numpy_is_put_back():
    states = random_states()
    states.pop("numpy", None)
    expected = torch.rand(3)
    set_random_states(states)
    assert torch.equal(torch.rand(3), expected)
