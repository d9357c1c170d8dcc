"""One fixed integer hash that turns (seed, epoch, index, ...) into a seed: the same on every platform, for ever.

Python's own `hash` depends on the process and torch's generators are not meant for hashing, so the order of
the data and the seeds of random augmentation come from SplitMix64, written out here in pure Python.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """Return the output of SplitMix64 for one state: a bijection of the 64-bit integers that mixes every bit.

    Args:
        state: Any integer; its low 64 bits count.

    Returns:
        An integer from 0 to 2**64 - 1.

    Source: Steele, Lea, Flood (2014), Fast Splittable Pseudorandom Number Generators. Differs: no.

    Example:
        >>> hex(splitmix64(0))
        '0xe220a8397b1dcdaf'
    """
    z = (state + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def seed_for(seed: int, *words: int) -> int:
    """Return the 64-bit seed that belongs to a run's seed and some counters.

    The words are folded in one after another, h <- splitmix64(h xor word), from h = splitmix64(seed). So
    ``seed_for(s, epoch, index)`` differs for every index of one epoch, and neighbours share no pattern.
    (torch's CPU generator and ``numpy.random.seed`` use the low 32 bits only.)

    Args:
        seed: The run's seed, any integer; its low 64 bits count.
        *words: Counters such as the epoch and the index of an example, integers >= 0.

    Returns:
        An integer from 0 to 2**64 - 1.

    Example:
        >>> seed_for(0, 1, 2)
        6768782832058643234
    """
    h = splitmix64(seed)
    for word in words:
        h = splitmix64(h ^ word)
    return h
