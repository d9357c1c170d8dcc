"""Where real data lies for tests, and small IDX files that imitate it."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest


def real_data(name: str) -> Path:
    """The folder of real data, or a skip that says where it was looked for."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    root = Path(os.environ.get("ADADAGRAD_DATA") or beside)
    if not (root / name).is_dir():
        pytest.skip(f"no {name} in {root}: set ADADAGRAD_DATA to a folder that holds it")
    return root / name


def idx_bytes(shape: tuple[int, ...], values: bytes) -> bytes:
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + values


def write_mnist(folder: Path, train: int = 40, test: int = 10, compress: bool = False) -> Path:
    """Write four files that read as MNIST: image i is filled with i, its label is i modulo 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        images = b"".join(bytes([index % 256]) * (28 * 28) for index in range(count))
        for name, content in (
            (f"{part}-images-idx3-ubyte", idx_bytes((count, 28, 28), images)),
            (f"{part}-labels-idx1-ubyte", idx_bytes((count,), bytes(index % 10 for index in range(count)))),
        ):
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder
