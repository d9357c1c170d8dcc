"""Fabrics for the tests, on the CPU."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

pytest.importorskip("lightning")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what lightning imports
    from lightning.fabric import Fabric

    import adadagrad.integrations.fabric as integration

import adadagrad as ada
from tests.integrations.hosts import SETTINGS, make_data, make_model, make_optimizer, policy


def make_fabric(**options: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", **{"devices": 1, **options})
    fabric.launch()
    return fabric


def fabric_of_rank(rank: int, ranks: int = 2, **options: Any) -> Fabric:
    """Return one for a process that a test has started, as `torchrun` would have."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test"}
    return make_fabric(devices=ranks, **options)


def make_engine(
    fabric: Fabric, dtype: Any = None, *, data: Any = None, model_seed: int = 0, **options: Any
) -> tuple[ada.AdaptiveBatch, Any, Any]:
    """Return the hosts' task set up by Fabric, with the model and the optimizer that it has made."""
    own = make_model(seed=model_seed) if dtype is None else make_model(dtype, model_seed)
    model, optimizer = fabric.setup(own, make_optimizer(own))
    data = data if data is not None else make_data() if dtype is None else make_data(dtype)
    settings = {**SETTINGS, **options}
    engine = integration.adaptive_batch(fabric, model, optimizer, data, settings.pop("policy", policy()), **settings)
    return engine, model, optimizer
