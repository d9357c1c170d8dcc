"""What Fabric does by itself and the engine would have to undo is refused, with a way out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from adadagrad.core.errors import InvalidArgument
from tests.integrations.fabrics import integration, make_engine, make_fabric
from tests.integrations.hosts import SETTINGS, make_data, make_model, make_optimizer, policy


@pytest.mark.parametrize("which", ["model", "optimizer"])
def test_what_was_not_set_up(which: str) -> None:
    fabric, own = make_fabric(), make_model()
    plain = make_optimizer(own)
    model, optimizer = fabric.setup(own, plain)
    given = (own, optimizer) if which == "model" else (model, plain)
    with pytest.raises(InvalidArgument, match=rf"{which} was not set up by Fabric.*fabric.setup\(model, optimizer\)"):
        integration.adaptive_batch(fabric, *given, make_data(), policy(), **SETTINGS)


def test_something_else_than_a_fabric() -> None:
    with pytest.raises(InvalidArgument, match=r"fabric must be a lightning.fabric.Fabric, got 'cpu'"):
        make_engine_with("cpu")


def make_engine_with(fabric: Any, **options: Any) -> Any:
    own = make_model()
    model, optimizer = make_fabric().setup(own, make_optimizer(own))
    return integration.adaptive_batch(fabric, model, optimizer, make_data(), policy(), **SETTINGS, **options)


@pytest.mark.parametrize("option", ["parallel", "grad_scaler"])
def test_what_fabric_decides(option: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{option} is Fabric's own: leave it out"):
        make_engine(make_fabric(), **{option: None})


@pytest.mark.parametrize("name", ["FSDPStrategy", "DataParallelStrategy"])
def test_strategies_that_own_the_gradient(name: str) -> None:
    from lightning.fabric import strategies

    fabric = make_fabric()
    fabric._strategy = object.__new__(getattr(strategies, name))  # which cannot be made without GPUs
    fabric._strategy.precision = None
    with pytest.raises(InvalidArgument, match=rf'fabric runs by {name}.*strategy="ddp"'):
        make_engine_with(fabric)


def test_a_scheduler_beside_a_schedule() -> None:
    fabric, own = make_fabric(), make_model()
    plain = make_optimizer(own)
    torch.optim.lr_scheduler.StepLR(plain, 10)
    model, optimizer = fabric.setup(own, plain)
    with pytest.raises(InvalidArgument, match="second owner of the learning rate"):
        integration.adaptive_batch(fabric, model, optimizer, make_data(), policy(), **SETTINGS)


def test_without_lightning_the_import_names_the_extra_and_the_library_needs_none() -> None:
    lines = "import sys; sys.modules['lightning'] = None; import adadagrad; import adadagrad.integrations.fabric"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "adadagrad.core.errors.MissingExtra: lightning is not installed: pip install 'adadagrad[lightning]'"
    )
