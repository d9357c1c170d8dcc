"""How many examples' gradients are formed at a time."""

from __future__ import annotations

from collections.abc import Iterator

CHUNK_BYTES = 1 << 22
"""Most bytes of per-example gradients that exist at a time; a few megabytes stay in the cache of a CPU."""


def chunks(n: int, bytes_per_example: int, most: int | None = None) -> Iterator[slice]:
    """Cut n examples into slices whose materialised gradients fit into `CHUNK_BYTES`.

    Args:
        n: Number of examples.
        bytes_per_example: Bytes of one example's materialised gradient.
        most: Another number of bytes to fit into.

    Yields:
        Slices that cover range(n) in order, at least one example each.
    """
    length = max(1, (CHUNK_BYTES if most is None else most) // max(1, bytes_per_example))
    for start in range(0, n, length):
        yield slice(start, min(n, start + length))
