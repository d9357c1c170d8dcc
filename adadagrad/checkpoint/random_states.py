"""The states of all random number generators of a process, as plain values and tensors."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def random_states() -> dict[str, Any]:
    """Return the states of all random number generators of this process, as plain values and tensors."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state()
        states["numpy"] = [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, float(cached)]
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put all random number generators back.

    Args:
        states: What `random_states` returned; generators that this process does not have are left out.
    """
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    numpy = sys.modules.get("numpy")
    if "numpy" in states and numpy is not None:
        name, keys, position, has_gauss, cached = states["numpy"]
        numpy.random.set_state((name, keys.tolist(), position, has_gauss, cached))
