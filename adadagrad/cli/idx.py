"""The IDX format of MNIST: a header that says what follows, checked against what does follow."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from adadagrad.core.errors import InvalidData

UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path, dimensions: int) -> Tensor:
    """Read one IDX file of unsigned bytes, plain or compressed by gzip.

    The format is two zero bytes, one byte for the type, one for the number of dimensions, the sizes as 32-bit
    big-endian integers, then the values.

    Args:
        path: The file; one that ends in ``.gz`` is decompressed.
        dimensions: How many the file must have: 3 for images, 1 for labels.

    Returns:
        The values, uint8, of the shape that the header gives.

    Raises:
        InvalidData: The file cannot be read, has another type or number of dimensions, or is longer or shorter than
            its header says.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidData(f"{path} is a damaged or truncated gzip file ({error}): download it again") from error
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error.strerror or error}") from error
    header = 4 + 4 * dimensions
    if len(content) < 4 or content[:3] != bytes((0, 0, UNSIGNED_BYTE)):
        raise InvalidData(f"{path} is not an IDX file of unsigned bytes: it begins with {content[:4].hex(' ')!r}")
    if content[3] != dimensions:
        raise InvalidData(f"{path} has {content[3]} dimensions, expected {dimensions}: images and labels mixed up?")
    if len(content) < header:
        raise InvalidData(f"{path} is truncated inside its header: {len(content)} bytes of {header}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise InvalidData(
            f"{path} is {'truncated' if len(content) < expected else 'too long'}: its header announces "
            f"{' x '.join(str(size) for size in shape)} values, {expected} bytes, and it holds {len(content)}: "
            "download it again"
        )
    if expected == header:
        raise InvalidData(f"{path} holds no example")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)
