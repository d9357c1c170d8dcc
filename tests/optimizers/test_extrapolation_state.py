"""What the extrapolating optimizers keep, and what they refuse."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from adadagrad.core.errors import InvalidArgument, UnknownName
from adadagrad.core.optimizing import Extrapolating
from adadagrad.optimizers.extrapolated_adam import ExtrapolatedAdam
from adadagrad.optimizers.extrapolated_sgd import ExtrapolatedSGD
from tests.optimizers.test_extrapolation import OPTIMIZERS, parameters, reference_sgd, train
from tests.optimizers.test_extrapolation_safety import same, started

STATES: list[tuple[str, dict[str, Any]]] = [
    *(("sgd", {"perturb": name}) for name in ("past_local", "past_global", "isotropic", "filter")),
    *(("sgd", {"workers": 2}), ("sgd", {"momentum": 0.0})),
    *(("adam", {"direction": "precond"}), ("adam", {"direction": "grad", "workers": 2})),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), STATES, ids=str)
def test_resuming_is_bitwise(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    def build() -> tuple[list[nn.Parameter], Any]:
        params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "extrapolation": 2.0}]
        return params, OPTIMIZERS[kind](groups, lr=0.05, **options)

    params, optimizer = build()
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, other = build()
    with torch.no_grad():
        for param, value in zip(others, saved["params"], strict=True):
            param.copy_(value)
    other.load_state_dict(saved["optimizer"])
    train(other, others, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert params[0].dtype == dtype


def test_state_is_what_is_promised() -> None:
    params = parameters()
    for options, names in [
        ({}, {"velocity", "local_gradient"}),
        ({"momentum": 0.0}, {"local_gradient"}),
        ({"perturb": "past_global"}, {"velocity", "past_gradient"}),
        ({"perturb": "filter"}, {"velocity"}),
        ({"extrapolation": 0.0}, {"velocity"}),
    ]:
        optimizer: Any = ExtrapolatedSGD(params, **options)  # type: ignore[arg-type]
        train(optimizer, params, range(2))
        assert set(optimizer.state[params[0]]) == names
    optimizer = ExtrapolatedSGD(params, workers=3)
    train(optimizer, params, range(2))
    assert optimizer.state[params[0]]["local_gradient"].shape == (3, 3, 4)
    optimizer = ExtrapolatedAdam(params)
    train(optimizer, params, range(2))
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_groups_have_options_of_their_own() -> None:
    names = ["past_local", "past_global", "isotropic", "filter"]
    params = parameters()
    groups = [{"params": [p], "perturb": n, "lr": 0.01 * (i + 1)} for i, (p, n) in enumerate(zip(params, names))]  # noqa: B905
    optimizer = ExtrapolatedSGD(groups, momentum=0.5)
    train(optimizer, params, range(4))
    for i, name in enumerate(names):
        alone = reference_sgd(4, [0.01 * (i + 1)] * 4, perturb=name, momentum=0.5)
        torch.testing.assert_close(params[i].detach(), alone[i], rtol=1e-12, atol=1e-13)


def test_offers_what_an_engine_asks_for() -> None:
    for kind, options, local in [
        ("sgd", {}, True),
        ("sgd", {"perturb": "filter"}, False),
        ("adam", {}, False),
        ("adam", {"direction": "grad"}, True),
    ]:
        optimizer: Any = OPTIMIZERS[kind](parameters(), **options)  # type: ignore[arg-type]
        assert isinstance(optimizer, Extrapolating)
        assert optimizer.needs_local_gradients == optimizer.own_state == local


def test_copies_are_independent() -> None:
    params, optimizer = started("sgd", {})
    others, other = copy.deepcopy((params, optimizer))
    train(optimizer, params, range(3, 5))
    train(other, others, range(3, 5))
    assert same(params, others)


BAD: list[tuple[str, dict[str, Any], str]] = [
    *((kind, {"lr": -0.1}, "lr must be >= 0, got -0.1") for kind in OPTIMIZERS),
    *((kind, {"extrapolation": -1.0}, "extrapolation must be >= 0, got -1.0") for kind in OPTIMIZERS),
    *((kind, {"weight_decay": -1.0}, "weight_decay must be >= 0, got -1.0") for kind in OPTIMIZERS),
    *((kind, {"workers": 0}, "workers must be >= 1, got 0") for kind in OPTIMIZERS),
    *((kind, {"workers": 1.5}, "workers must be an integer, got 1.5") for kind in OPTIMIZERS),
    ("sgd", {"momentum": 1.0}, "momentum must be >= 0 and below 1, got 1.0"),
    ("sgd", {"perturb": "past_locale"}, "unknown perturb 'past_locale': did you mean past_local"),
    ("sgd", {"filter_norm": "l2"}, "unknown filter_norm 'l2'"),
    ("sgd", {"seed": -1}, "seed must be >= 0, got -1"),
    ("adam", {"betas": (0.9, 1.0)}, r"betas\[1\] must be >= 0 and below 1, got 1.0"),
    ("adam", {"eps": 0.0}, "eps must be > 0, got 0.0"),
    ("adam", {"direction": "gradient"}, "unknown direction 'gradient': did you mean grad"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD, ids=str)
def test_bad_options(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        OPTIMIZERS[kind](parameters(), **options)
    with pytest.raises(InvalidArgument, match=message):
        OPTIMIZERS[kind]([{"params": parameters(), **options}])


def test_other_bad_input() -> None:
    optimizer = ExtrapolatedSGD(parameters(), workers=2)
    for worker in (-1, 2, True, 1.0, None):
        with pytest.raises(InvalidArgument, match=f"worker must be an integer from 0 to 1, got {worker}"):  # noqa: SIM117
            with optimizer.extrapolated(worker):  # type: ignore[arg-type]
                pass
    with pytest.raises(InvalidArgument, match="workers must be the same in all groups, got 2 and 3"):
        optimizer.add_param_group({"params": parameters(), "workers": 3})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(InvalidArgument, match="model must be a DistributedDataParallel, got Linear"):
        ExtrapolatedAdam(parameters(), direction="grad").keep_local_gradients(nn.Linear(1, 1))
    with pytest.raises(InvalidArgument, match=r"use torch\.view_as_real"):
        ExtrapolatedSGD([nn.Parameter(torch.ones(1, dtype=torch.complex64))])
    assert issubclass(UnknownName, InvalidArgument)


def test_sparse_gradients_are_refused_and_change_nothing() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = ExtrapolatedSGD(embedding.parameters())
    before = embedding.weight.detach().clone()
    with optimizer.extrapolated():
        embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InvalidArgument, match=r"of shape \(10, 4\): set sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
