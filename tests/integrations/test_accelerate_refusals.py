"""What Accelerate does by itself and the engine would have to undo is refused, with a way out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, OverriddenSampler, UnsizedDataset
from tests.integrations.accelerators import accelerate, make_accelerator, make_engine
from tests.integrations.hosts import SETTINGS, make_data, make_model, make_optimizer, policy

DistributedType = accelerate.utils.DistributedType


@dataclass
class Elsewhere:
    """An accelerator as it is on machines that there are none of here."""

    distributed_type: Any = DistributedType.NO
    is_fsdp2: bool = False
    mixed_precision: str = "no"
    gradient_accumulation_steps: int = 1
    scaler: Any = None

    def register_for_checkpointing(self, *objects: Any) -> None: ...


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"gradient_accumulation_steps": 4},
            r"over 4 micro-batches by itself.*gradient_accumulation_steps=1.*micro_batch_size",
        ),
        (
            {"distributed_type": DistributedType.DEEPSPEED},
            "DEEPSPEED: DeepSpeed owns.*DistributedDataParallel or FSDP2",
        ),
        ({"distributed_type": DistributedType.MEGATRON_LM}, "MEGATRON_LM: Megatron-LM owns the loop"),
        ({"distributed_type": DistributedType.XLA}, "XLA: gradients of XLA devices"),
        ({"distributed_type": DistributedType.FSDP}, r"FSDP1.*FullyShardedDataParallelPlugin\(fsdp_version=2\)"),
        ({"mixed_precision": "fp8"}, "fp8, which has not been tried"),
    ],
)
def test_ways_that_leave_the_engine_no_gradient(where: dict[str, Any], message: str) -> None:
    accelerator = make_accelerator()
    with pytest.raises(InvalidArgument, match=message):
        make_engine_with(accelerator, Elsewhere(**where))


def make_engine_with(preparing: Any, accelerator: Any, **options: Any) -> ada.AdaptiveBatch:
    own = make_model()
    model, optimizer = preparing.prepare(own, make_optimizer(own))
    return ada.AdaptiveBatch(model, optimizer, make_data(), policy(), accelerator=accelerator, **SETTINGS, **options)


def test_fsdp2_and_float16_elsewhere_are_taken() -> None:
    where = Elsewhere(distributed_type=DistributedType.FSDP, is_fsdp2=True, scaler=torch.amp.GradScaler("cpu"))
    assert make_engine_with(make_accelerator(), where).scaling.enabled


def test_accumulation_of_a_real_accelerator() -> None:
    with pytest.raises(InvalidArgument, match="accumulates gradients over 2 micro-batches"):
        make_engine(make_accelerator(gradient_accumulation_steps=2))


def test_something_else_than_an_accelerator() -> None:
    with pytest.raises(InvalidArgument, match=r"accelerator must be an accelerate.Accelerator or None, got 'cpu'"):
        make_engine_with(make_accelerator(), "cpu")


def test_a_second_scaler() -> None:
    with pytest.raises(InvalidArgument, match="grad_scaler is the accelerator's own"):
        make_engine_with(make_accelerator(), make_accelerator(), grad_scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("which", ["model", "optimizer"])
def test_what_was_not_prepared_would_not_be_saved(which: str) -> None:
    accelerator, own = make_accelerator(), make_model()
    optimizer = make_optimizer(own)
    model, prepared = accelerator.prepare(own, optimizer)
    if which == "model":
        model = make_model()
        prepared = accelerator.prepare(make_optimizer(model))
    else:
        prepared = optimizer
    with pytest.raises(InvalidArgument, match=rf"{which} was not prepared by the accelerator.*accelerator.prepare\("):
        ada.AdaptiveBatch(model, prepared, make_data(), policy(), accelerator=accelerator, **SETTINGS)


@pytest.mark.parametrize("options", [{}, {"lr_schedule": None}])
def test_a_scheduler_that_counts_steps(options: dict[str, Any]) -> None:
    accelerator, own = make_accelerator(), make_model()
    optimizer = make_optimizer(own)
    model, prepared, _ = accelerator.prepare(own, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 10))
    with pytest.raises(InvalidArgument, match=r"a torch scheduler is attached.*lr_schedule=CosineSchedule"):
        ada.AdaptiveBatch(model, prepared, make_data(), policy(), accelerator=accelerator, **{**SETTINGS, **options})


def test_an_own_sampler_and_data_without_places() -> None:
    accelerator, data = make_accelerator(), make_data()
    loader = accelerator.prepare(DataLoader(data, sampler=WeightedRandomSampler([1.0] * len(data), 8)))
    with pytest.raises(OverriddenSampler, match=r"sampler of data \(WeightedRandomSampler\)"):
        make_engine(accelerator, data=loader)

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(data)

    with pytest.raises(UnsizedDataset, match="iterable data set"):
        make_engine(accelerator, data=accelerator.prepare(DataLoader(Stream())))


def test_without_accelerate_the_import_names_the_extra_and_the_engine_needs_none() -> None:
    lines = "import sys; sys.modules['accelerate'] = None; import adadagrad; import adadagrad.integrations.accelerate"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "adadagrad.core.errors.MissingExtra: accelerate is not installed: pip install 'adadagrad[hf]'"
    )
