"""How many examples' gradients are formed at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CHUNK_BYTES = 1 << 22
"""Most bytes of per-example gradients that exist at a time on a CPU; a few megabytes stay in its cache."""

ACCELERATOR = 64
"""How many times as many exist at a time elsewhere, where launching a kernel costs as much as reading megabytes."""


def room(like: Tensor, on_cpu: int | None = None) -> int:
    """Return how many bytes may be formed at a time.

    Args:
        like: A tensor on the device in question.
        on_cpu: How many on a CPU; None for `CHUNK_BYTES`.
    """
    on_cpu = CHUNK_BYTES if on_cpu is None else on_cpu
    return on_cpu if like.device.type == "cpu" else on_cpu * ACCELERATOR


def chunks(n: int, bytes_per_example: int, most: int) -> Iterator[slice]:
    """Cut n examples into slices whose materialised gradients fit into a number of bytes.

    Args:
        n: Number of examples.
        bytes_per_example: Bytes of one example's materialised gradient.
        most: The number of bytes; see `room`.

    Yields:
        Slices that cover range(n) in order, at least one example each.
    """
    length = max(1, most // max(1, bytes_per_example))
    for start in range(0, n, length):
        yield slice(start, min(n, start + length))
