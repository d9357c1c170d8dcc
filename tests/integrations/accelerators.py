"""Accelerators for the tests: on the CPU, with no state left of the one before."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

pytest.importorskip("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what accelerate imports
    import accelerate
from accelerate.state import AcceleratorState, GradientState

import adadagrad as ada
from tests.integrations.hosts import SETTINGS, make_data, make_model, make_optimizer, policy


def make_accelerator(**options: Any) -> accelerate.Accelerator:
    AcceleratorState._reset_state(True)  # Accelerate keeps its settings in singletons, for the process's life
    GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, **options)


def accelerator_of_rank(rank: int, ranks: int = 2, **options: Any) -> accelerate.Accelerator:
    """Return one for a process that a test has started, as `accelerate launch` would have."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    return make_accelerator(**options)


def make_engine(
    accelerator: accelerate.Accelerator, dtype: Any = None, *, data: Any = None, model_seed: int = 0, **options: Any
) -> ada.AdaptiveBatch:
    """Return the hosts' task prepared by an accelerator; ``engine.model`` is what it made of the model."""
    own = make_model(seed=model_seed) if dtype is None else make_model(dtype, model_seed)
    model, optimizer = accelerator.prepare(own, make_optimizer(own))
    data = data if data is not None else make_data() if dtype is None else make_data(dtype)
    settings = {**SETTINGS, "accelerator": accelerator, **options}
    return ada.AdaptiveBatch(model, optimizer, data, settings.pop("policy", policy()), **settings)
