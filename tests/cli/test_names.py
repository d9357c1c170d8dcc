"""Every name makes what it says, and an unknown one is answered with the nearest."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from adadagrad.cli.building import make_engine
from adadagrad.cli.config import BatchOptions, OptimizerOptions, PolicyOptions, Settings
from adadagrad.cli.data import DataSource, load_data
from adadagrad.cli.names import (
    MODELS,
    POLICIES,
    make_model,
    make_policy,
    make_schedule,
)
from adadagrad.cli.optimizers import OPTIMIZERS, make_optimizer
from adadagrad.cli.rates import RATES, make_rate
from adadagrad.core.errors import InvalidArgument, UnknownName
from adadagrad.rates import LinearScaling
from tests.policies.test_recorded import START, step, write

OPTIONS = PolicyOptions(
    eta=0.5,
    theta=0.3,
    nu=2.0,
    fraction=0.3,
    averaging=0.9,
    cabs_scale=2.0,
    loss_offset=0.1,
    delta=0.2,
    stages="0:8 1K:16",
    end_batch_size=96,
    ramp_samples=500,
    increment=32,
    every_samples=100,
)


def data(*shape: int) -> DataSource:
    sets = TensorDataset(torch.zeros(5, *shape), torch.arange(5))
    return DataSource(name="zeros", train=sets, held_out=sets, split="val")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("norm", "NormTest(eta=0.5, finite_population='off')"),
        ("inner-product", "InnerProductTest(theta=0.3, finite_population='off')"),
        ("augmented", "AugmentedInnerProductTest(theta=0.3, nu=2.0, finite_population='off')"),
        ("coordinate", "CoordinateNormTest(eta=0.5, reduction='max', quantile=None, finite_population='off')"),
        ("noise-scale", "GradientNoiseScale(fraction=0.3, averaging=0.9)"),
        ("cabs", "CABS(scale=2.0, loss_offset=0.1, averaging=0.9)"),
        ("divebatch", "DiveBatch(delta=0.2)"),
        ("big-batch", "BigBatch(increment=32, eta=0.5)"),
        ("constant", "ConstantBatch(global_batch_size=32)"),
        ("staged", "StagedBatch(stages=((0, 8), (1000, 16)))"),
        ("linear", "LinearBatch(start=32, end=96, ramp_samples=500, increment=32)"),
        ("geometric", "GeometricBatch(start=32, factor=2.0, every_samples=100, end=96)"),
    ],
)
def test_policies(name: str, text: str) -> None:
    assert repr(make_policy(BatchOptions(policy=name, global_batch_size=32), OPTIONS)) == text
    assert name in POLICIES


def test_recorded_reads_a_log(tmp_path: Path) -> None:
    write(tmp_path, START, step(4, 8))
    policy = make_policy(BatchOptions(policy="recorded"), PolicyOptions(plan=str(tmp_path)))
    assert repr(policy) == "RecordedBatch(plan=((0, 4), (4, 8)))"


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("recommended", LinearScaling()),
        ("noise-scale", LinearScaling()),
        ("norm", None),
        ("constant", None),
        ("cabs", None),
    ],
)
def test_the_recommended_rate_follows_a_batch_near_the_noise_scale_and_no_other(name: str, rate: Any) -> None:
    pytest.importorskip("sklearn")
    engine = make_engine(Settings(batch=BatchOptions(policy=name)), load_data("digits"), None)
    assert engine.learning_rate.rule == rate


def test_quantile_is_given_to_the_reduction_that_has_one() -> None:
    options = PolicyOptions(reduction="quantile", quantile=0.8)
    assert "quantile=0.8" in repr(make_policy(BatchOptions(policy="coordinate"), options))


@pytest.mark.parametrize(
    ("name", "flag"),
    [("staged", "stages"), ("linear", "end-batch-size"), ("geometric", "every-samples"), ("recorded", "plan")],
)
def test_an_option_that_a_policy_cannot_do_without(name: str, flag: str) -> None:
    with pytest.raises(InvalidArgument, match=f"--{flag} must be given with --policy {name}"):
        make_policy(BatchOptions(policy=name), PolicyOptions())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizers(name: str) -> None:
    options = OptimizerOptions(optimizer=name, lr=0.3, weight_decay=0.1)
    group = make_optimizer(nn.Linear(2, 2), options).param_groups[0]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.3, 0.1, 2)


def test_frozen_parameters_are_left_to_themselves() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert len(make_optimizer(model, OptimizerOptions()).param_groups[0]["params"]) == 1


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_numbers_that_no_optimizer_can_use_are_refused_by_name(name: str, option: str, value: float) -> None:
    """An infinite learning rate is accepted by torch, and then every step is skipped."""
    with pytest.raises(InvalidArgument, match=f"{option} must be >= 0, got {value}"):
        make_optimizer(nn.Linear(2, 2), replace(OptimizerOptions(optimizer=name), **{option: value}))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none", "None"),
        ("adascale", "AdaScale(base_batch_size=8, smoothing=0.9, progress_in='samples')"),
        ("adamscale", "AdamScale(base_batch_size=8, smoothing=0.9, power=0.5, progress_in='samples')"),
        ("accumulator", "AccumulatorScale(memory=0.999, base_batch_size=8, smoothing=0.9, progress_in='samples')"),
        ("linear", "LinearScaling(base_batch_size=8)"),
        ("sqrt", "SquareRootScaling(base_batch_size=8)"),
        ("legw", "LEGW(base_warmup_epochs=2.0, base_batch_size=8)"),
        ("seesaw", "Seesaw(base_batch_size=8)"),
    ],
)
def test_rates(name: str, text: str) -> None:
    options = OptimizerOptions(rate=name, base_batch_size=8, smoothing=0.9, progress_in="samples", legw_epochs=2.0)
    assert repr(make_rate(torch.optim.Adam(nn.Linear(2, 2).parameters()), options)) == text
    assert name in RATES


def test_schedules() -> None:
    assert make_schedule(OptimizerOptions()) is None
    cosine = make_schedule(OptimizerOptions(lr_schedule="cosine", warmup_samples=10, lr_floor=0.1))
    assert cosine is not None
    assert [round(cosine(t, 110), 3) for t in (5, 10, 110)] == [0.5, 1.0, 0.1]
    linear = make_schedule(OptimizerOptions(lr_schedule="linear"))
    assert linear is not None
    assert linear(50, 100) == 0.5
    step = make_schedule(OptimizerOptions(lr_schedule="step", lr_milestones="10:0.5, 20:0.1"))
    assert step is not None
    assert [step(t, 100) for t in (0, 10, 25)] == [1.0, 0.5, 0.1]
    for text in ("10", ""):
        with pytest.raises(InvalidArgument, match=rf"--lr-milestones must be like .*, got '{text}'"):
            make_schedule(OptimizerOptions(lr_schedule="step", lr_milestones=text))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("size", [8, 28])
def test_models_fit_the_data(name: str, size: int) -> None:
    model = make_model(name, data(1, size, size))
    assert model(torch.zeros(3, 1, size, size)).shape == (3, 5)


def test_the_papers_network_has_its_sizes() -> None:
    shapes = [tuple(p.shape) for p in make_model("cnn", data(1, 28, 28)).parameters()]
    assert shapes == [(16, 1, 5, 5), (16,), (32, 16, 5, 5), (32,), (5, 1568), (5,)]


def test_cnn_needs_images() -> None:
    with pytest.raises(InvalidArgument, match=r"--model cnn needs images .* got inputs of shape \(7,\)"):
        make_model("cnn", data(7))


def test_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model.py").write_text("from torch import nn\nmake = lambda: nn.Linear(2, 2)\nother = lambda: 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(make_model("own_model:make", data(2)), nn.Linear)
    with pytest.raises(InvalidArgument, match=r"must return a torch\.nn\.Module, got int"):
        make_model("own_model:other", data(2))


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UnknownName, match="unknown policy 'nrom': did you mean norm"):
        make_policy(BatchOptions(policy="nrom"), PolicyOptions())
    with pytest.raises(UnknownName, match=r"unknown policy 'recomended': did you mean recommended"):
        make_policy(BatchOptions(policy="recomended"), PolicyOptions())
    with pytest.raises(UnknownName, match=r"unknown rate 'adscale': did you mean adascale"):
        make_rate(torch.optim.Adam(nn.Linear(2, 2).parameters()), OptimizerOptions(rate="adscale"))
    with pytest.raises(UnknownName, match="unknown optimizer 'adagrad_norm': did you mean adagrad-norm"):
        make_optimizer(nn.Linear(2, 2), OptimizerOptions(optimizer="adagrad_norm"))
    with pytest.raises(UnknownName, match="unknown lr-schedule 'cosin': did you mean cosine"):
        make_schedule(OptimizerOptions(lr_schedule="cosin"))
    with pytest.raises(UnknownName, match=r"unknown model 'resnet'.*known: cnn, logistic, mlp"):
        make_model("resnet", data(2))
