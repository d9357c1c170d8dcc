"""Optimizers whose state is in half precision against torch's own, whose numbers are exact: 0.999 is not 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adadagrad.optimizers import MARS, AdaGradNorm, LaMAdam, MAdam
from adadagrad.optimizers.base import multiply_
from adadagrad.optimizers.extrapolated_adam import ExtrapolatedAdam
from adadagrad.optimizers.extrapolated_sgd import ExtrapolatedSGD

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALF
def test_numbers_are_not_rounded_before_they_multiply(dtype: torch.dtype) -> None:
    values = torch.linspace(1, 2, 130).to(dtype)
    for factors in (0.99, [0.99], torch.tensor(0.99), [torch.tensor(0.99)]):
        found = values.clone()
        multiply_([found], factors)
        assert torch.equal(found, (values.float() * 0.99).to(dtype))


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    """Large at first, so that an average that does not forget stays large."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(200, generator=generator) * (10 if t < 20 else 1)).to(dtype) for t in range(150)]


@pytest.mark.parametrize("second", [0.99, 0.999])
@pytest.mark.parametrize("kind", ["mars", "extrapolated"])
@HALF
def test_second_moments_are_those_of_adam(kind: str, second: float, dtype: torch.dtype) -> None:
    mine, other = (nn.Parameter(torch.zeros(200, dtype=dtype)) for _ in range(2))
    ours: torch.optim.Optimizer = (
        MARS([mine], which="all", betas=(0.9, second), clip=False, gamma=0.0)
        if kind == "mars"
        else ExtrapolatedAdam([mine], betas=(0.9, second), extrapolation=0.0)
    )
    theirs = torch.optim.AdamW([other], betas=(0.9, second), foreach=False)
    for gradient in gradients(dtype):
        mine.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    assert torch.equal(ours.state[mine]["exp_avg_sq"], theirs.state[other]["exp_avg_sq"])


def test_momentum_near_one_forgets() -> None:
    param = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    optimizer = ExtrapolatedSGD([param], lr=1.0, momentum=0.99, extrapolation=0.0, nesterov=False)
    velocity = torch.zeros(8, dtype=torch.bfloat16)
    for t in range(30):
        param.grad = torch.full((8,), 1.0 if t == 0 else 0.0, dtype=torch.bfloat16)
        optimizer.step()
        velocity = velocity.mul(0.99) - param.grad
        assert torch.equal(optimizer.state[param]["velocity"], velocity)


@pytest.mark.parametrize(
    "make", [AdaGradNorm, MARS, MAdam, LaMAdam, ExtrapolatedAdam, ExtrapolatedSGD], ids=lambda m: m.__name__
)
def test_weight_decay_is_not_rounded(make: type[torch.optim.Optimizer]) -> None:
    values = torch.linspace(1, 2, 130).bfloat16()
    param = nn.Parameter(values.clone())
    options = {"extrapolation": 0.0} if make in (ExtrapolatedAdam, ExtrapolatedSGD) else {}
    options |= {"momentum": 0.0} if make is ExtrapolatedSGD else {}
    optimizer = make([param], lr=0.1, weight_decay=0.1, **options)  # type: ignore[call-arg]
    param.grad = torch.zeros_like(param)
    if make is AdaGradNorm:
        param.grad[0] = 1e-30
    optimizer.step()
    assert torch.equal(param.detach()[1:], (values.float() * 0.99).bfloat16()[1:])
