"""The record: what it does to images, what it refuses, and that a file gives it back or says why not."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from adadagrad.apps.universal_perturbation import (
    Perturbation,
    evaluate,
    find_universal_perturbation,
    load_perturbation,
    save_perturbation,
)
from adadagrad.checkpoint import save_checkpoint
from adadagrad.core.errors import CorruptCheckpoint, InvalidArgument
from tests.apps.universal_perturbation.cases import labelled, network, some_images


def made(**changes: Any) -> Perturbation:
    settings: dict[str, Any] = {"delta": torch.full((1, 5, 5), 0.1), "eps": 0.1, "method": "by hand"}
    return Perturbation(**settings | changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_apply_adds_and_cuts_off_in_the_images_own_dtype(dtype: torch.dtype) -> None:
    delta = torch.tensor([[[0.25, -0.25, 0.25, -0.125]]])
    images = torch.tensor([[[[0.5, 0.125, 0.875, 1.0]]]] * 3, dtype=dtype)
    kept = images.clone()
    out = made(delta=delta, eps=0.25).apply(images)
    assert out.dtype == dtype
    assert out.tolist() == [[[[0.75, 0.0, 1.0, 0.875]]]] * 3
    assert torch.equal(images, kept)


def test_apply_lets_gradients_through_to_the_images() -> None:
    images = some_images(2).requires_grad_()
    made().apply(images).sum().backward()
    assert images.grad is not None
    assert images.grad.unique().tolist() == [0.0, 1.0]  # 0 where cut off


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            some_images() * 2 - 1,
            r"images must lie in \[0, 1\], got values from -.*put the normalisation into the model",
        ),
        (some_images()[0], r"images must have shape \(n, C, H, W\) with n >= 1, got \(1, 5, 5\)"),
        (some_images()[:, :, :4], r"images must have shape \(n, \*\(1, 5, 5\)\) here, got \(24, 1, 4, 5\)"),
        ((some_images() * 255).byte(), "floating point"),
        ([0.5], "images must be a tensor, got a list"),
    ],
)
def test_apply_refuses_what_are_no_such_images(images: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        made().apply(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -1.0}, r"eps must be between 0 and 1, got -1\.0"),
        ({"eps": 0.05}, r"delta must lie within eps = 0\.05 of 0, got a largest entry of 0\.1: pass delta\.clamp"),
        ({"delta": torch.full((1, 5, 5), float("nan"))}, "largest entry of nan"),
        ({"delta": torch.zeros(5, 5)}, r"delta must be a floating-point tensor \(C, H, W\), got \(5, 5\)"),
        ({"delta": torch.zeros(1, 5, 5, dtype=torch.int64)}, r"got \(1, 5, 5\) of torch\.int64"),
        ({"delta": [0.0]}, "got a list"),
        ({"gradient_count": -1}, "gradient_count must be >= 0"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"seed": None}, "seed must be an integer"),
        ({"target": -1}, "target must be >= 0"),
    ],
)
def test_records_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        made(**changes)


def test_a_clamped_tensor_is_within_its_radius_in_every_dtype() -> None:
    """0.1 rounds up in float32 and bfloat16: the entries are taken back by one step."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        perturbation = made(delta=torch.ones(1, 5, 5, dtype=dtype).clamp(-0.1, 0.1))
        assert perturbation.linf_norm <= 0.1
        assert perturbation.linf_norm == pytest.approx(0.1, rel=1e-2)
        assert perturbation.delta.dtype == dtype


def test_the_record_is_frozen_and_keeps_a_copy() -> None:
    delta = torch.zeros(1, 5, 5, requires_grad=True)
    perturbation = made(delta=delta)
    with torch.no_grad():
        delta += 1
    assert perturbation.linf_norm == 0
    assert not perturbation.delta.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        perturbation.eps = 0.2  # type: ignore[misc]


def assert_same(one: Perturbation, other: Perturbation) -> None:
    for field in dataclasses.fields(Perturbation):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if field.name == "delta" else a == b


@pytest.mark.parametrize("method", ["sga", "spgd", "random"])
def test_a_file_gives_everything_back_bit_for_bit(tmp_path: Path, method: str) -> None:
    target = None if method == "spgd" else 1
    found = find_universal_perturbation(network(), some_images(), 0.1, method=method, epochs=1, target=target, seed=3)
    save_perturbation(tmp_path / "new" / "own.pt", found)
    loaded = load_perturbation(str(tmp_path / "new" / "own.pt"))
    assert_same(found, loaded)
    assert evaluate(network(), loaded, [labelled()]) == evaluate(network(), found, [labelled()])
    content = torch.load(tmp_path / "new" / "own.pt", weights_only=True)
    assert torch.equal(content["delta"], found.delta)
    save_perturbation(tmp_path / "new" / "own.pt", made())
    assert_same(load_perturbation(tmp_path / "new" / "own.pt"), made())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["own.pt"]


def test_settings_that_are_not_plain_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for settings in ({"scheme": object()}, {"parts": [1, 2]}, {3: 4}):
        with pytest.raises(InvalidArgument, match="settings must be plain values by name"):
            save_perturbation(tmp_path / "own.pt", made(settings=settings))
    with pytest.raises(InvalidArgument, match="perturbation must be a Perturbation, got a Tensor"):
        save_perturbation(tmp_path / "own.pt", torch.zeros(1))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_every_flipped_or_missing_byte_of_the_values_is_noticed(tmp_path: Path) -> None:
    path, bad = tmp_path / "own.pt", tmp_path / "bad.pt"
    save_perturbation(path, made())
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        values = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    first = whole.index(archive_bytes := made().delta.numpy().tobytes())
    assert values.file_size == len(archive_bytes)
    for place in range(first, first + len(archive_bytes), 7):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptCheckpoint, match=r"bad\.pt"):
            load_perturbation(bad)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpoint, match=r"bad\.pt"):
            load_perturbation(bad)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    with pytest.raises(CorruptCheckpoint, match="does not exist"):
        load_perturbation(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(CorruptCheckpoint, match=r"other\.pt"):
        load_perturbation(path)
    save_checkpoint(path, {"model": {}})
    with pytest.raises(CorruptCheckpoint, match="holds no perturbation: pass a file that save_perturbation wrote"):
        load_perturbation(path)
    save_checkpoint(path, {"kind": "universal_perturbation", "eps": 0.1})
    with pytest.raises(CorruptCheckpoint, match="lacks delta, method, seed"):
        load_perturbation(path)
    good = {field.name: getattr(made(), field.name) for field in dataclasses.fields(Perturbation)}
    save_checkpoint(path, {"kind": "universal_perturbation", **good, "eps": 0.01})
    with pytest.raises(CorruptCheckpoint, match="contradicts itself: delta must lie within eps"):
        load_perturbation(path)
