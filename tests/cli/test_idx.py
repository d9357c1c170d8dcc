"""IDX files: what the header says against what the file holds."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
import torch

from adadagrad.cli.idx import read_idx
from adadagrad.core.errors import InvalidData
from tests.cli.mnist_folder import idx_bytes

VALID = idx_bytes((2, 2, 3), bytes(range(12)))


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_reads_shape_and_values(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(VALID) if name.endswith(".gz") else VALID)
    values = read_idx(path, dimensions=3)
    assert values.dtype == torch.uint8
    assert values.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file"),
        (VALID[:3], "is not an IDX file"),
        (b"\x00\x00\x0d" + VALID[3:], r"is not an IDX file of unsigned bytes: it begins with '00 00 0d 03'"),
        (gzip.compress(VALID, mtime=0), "is not an IDX file"),
        (idx_bytes((12,), bytes(12)), "has 1 dimensions, expected 3: images and labels mixed up"),
        (VALID[:9], "truncated inside its header: 9 bytes of 16"),
        (VALID[:-1], r"is truncated: its header announces 2 x 2 x 3 values, 28 bytes, and it holds 27"),
        (VALID + b"\x00", "is too long: .* holds 29"),
        (idx_bytes((0, 2, 3), b""), "holds no example"),
        (idx_bytes((2**31, 2**31, 4), b"\x00"), "is truncated"),
    ],
    ids=[
        "empty",
        "magic-cut",
        "not-bytes",
        "gzip",
        "labels",
        "header-cut",
        "values-cut",
        "too-long",
        "no-example",
        "huge",
    ],
)
def test_damage_is_named_with_the_path(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(InvalidData, match=f"{re.escape(str(path))}.*{message}"):
        read_idx(path, dimensions=3)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    compressed = gzip.compress(VALID, mtime=0)
    for whole, name in ((VALID, "images"), (compressed, "images.gz")):
        for length in range(len(whole)):
            path = tmp_path / name
            path.write_bytes(whole[:length])
            with pytest.raises(InvalidData, match=re.escape(str(path))):
                read_idx(path, dimensions=3)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(VALID)
    with pytest.raises(InvalidData, match="damaged or truncated gzip file"):
        read_idx(path, dimensions=3)
    flipped = bytearray(gzip.compress(VALID))
    flipped[len(flipped) // 2] ^= 0xFF
    path.write_bytes(bytes(flipped))
    with pytest.raises(InvalidData):
        read_idx(path, dimensions=3)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="nothing cannot be read: No such file"):
        read_idx(tmp_path / "nothing", dimensions=1)
