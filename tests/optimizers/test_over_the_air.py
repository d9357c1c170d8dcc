"""AdaGrad-OTA and Adam-OTA against their equations, one coordinate at a time, and against torch where alpha is 2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.federated.stable import sample_alpha_stable
from adadagrad.optimizers.over_the_air import OverTheAirAdaGrad, OverTheAirAdam

Kind = type[OverTheAirAdaGrad] | type[OverTheAirAdam]
both = pytest.mark.parametrize("kind", [OverTheAirAdaGrad, OverTheAirAdam], ids=lambda kind: kind.__name__)


def gradients(steps: int = 30, alpha: float = 1.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [sample_alpha_stable((7,), alpha, 1.0, generator=generator, dtype=torch.float64) for _ in range(steps)]


def run(make: Any, grads: list[Tensor]) -> list[Tensor]:
    x = nn.Parameter(torch.linspace(-1, 1, len(grads[0]), dtype=torch.float64))
    optimizer = make([x])
    seen = []
    for grad in grads:
        x.grad = grad.clone()
        optimizer.step()
        seen.append(x.detach().clone())
    return seen


def slow(
    grads: list[Tensor],
    lr: float,
    alpha: float,
    beta1: float,
    beta2: float | None,
    eps: float,
    decay: float = 0.0,
) -> list[Tensor]:
    """The equations in plain numbers: beta2 None adds powers up."""
    x = torch.linspace(-1, 1, len(grads[0]), dtype=torch.float64).tolist()
    delta, v = [0.0] * len(x), [0.0] * len(x)
    seen = []
    for grad in grads:
        for j, g in enumerate(grad.tolist()):
            delta[j] = beta1 * delta[j] + (1 - beta1) * g
            power = abs(delta[j]) ** alpha
            v[j] = v[j] + power if beta2 is None else beta2 * v[j] + (1 - beta2) * power
            x[j] = (1 - lr * decay) * x[j] - lr * delta[j] / (v[j] ** (1 / alpha) + eps)
        seen.append(torch.tensor(x, dtype=torch.float64))
    return seen


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 2])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_the_equations(alpha: float, decay: float) -> None:
    grads = gradients()
    mine = run(lambda p: OverTheAirAdaGrad(p, 0.3, alpha, 0.8, 1e-3, decay), grads)
    torch.testing.assert_close(mine, slow(grads, 0.3, alpha, 0.8, None, 1e-3, decay), rtol=1e-12, atol=1e-12)
    mine = run(lambda p: OverTheAirAdam(p, 0.3, alpha, (0.8, 0.4), 1e-3, decay), grads)
    torch.testing.assert_close(mine, slow(grads, 0.3, alpha, 0.8, 0.4, 1e-3, decay), rtol=1e-12, atol=1e-12)


def test_alpha_2_is_torch() -> None:
    """Without smoothing AdaGrad-OTA is Adagrad, and Adam-OTA is RMSprop and not Adam."""
    grads = gradients()
    mine = run(lambda p: OverTheAirAdaGrad(p, 0.1, 2.0, 0.0, 1e-10), grads)
    theirs = run(lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-10), grads)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-15)
    mine = run(lambda p: OverTheAirAdam(p, 0.1, 2.0, (0.0, 0.7), 1e-8), grads)
    theirs = run(lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.7, eps=1e-8), grads)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-15)
    adam = run(lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.7), eps=1e-8), grads)
    assert (adam[0] - mine[0]).abs().min() > 0.01


@pytest.mark.parametrize("alpha", [1.1, 1.5, 1.9, 2.0])
def test_the_first_step_is_the_sign(alpha: float) -> None:
    grads = gradients(1)
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    mine = run(lambda p: OverTheAirAdaGrad(p, 0.3, alpha, 0.0, 0.0), grads)[0]
    torch.testing.assert_close(mine - start, -0.3 * grads[0].sign(), rtol=1e-12, atol=1e-15)
    mine = run(lambda p: OverTheAirAdam(p, 0.3, alpha, (0.9, 0.3), 0.0), grads)[0]
    torch.testing.assert_close(mine - start, -0.3 / 0.7 ** (1 / alpha) * grads[0].sign(), rtol=1e-12, atol=1e-15)


def test_a_constant_gradient_gives_the_known_sum() -> None:
    grads = [torch.ones(1, dtype=torch.float64)] * 8
    end = run(lambda p: OverTheAirAdaGrad(p, 1.0, 1.5, 0.0, 0.0), grads)[-1].item() - -1.0
    assert end == pytest.approx(-3.675685, abs=1e-6)
    assert end == pytest.approx(-sum(t ** (-1 / 1.5) for t in range(1, 9)), rel=1e-14)


@both
@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e5])
def test_the_scale_of_all_gradients_does_not_matter_without_eps(kind: Kind, scale: float) -> None:
    grads = gradients()
    one = run(lambda p: kind(p, 0.1, alpha=1.3, eps=0.0), grads)
    two = run(lambda p: kind(p, 0.1, alpha=1.3, eps=0.0), [scale * g for g in grads])
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@both
def test_a_coordinate_without_a_gradient_yet_stands_still(kind: Kind) -> None:
    grads = [torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3
    seen = run(lambda p: kind(p, 0.1, eps=0.0), grads)
    assert seen[-1][0] == -1.0
    assert seen[-1].isfinite().all()
    assert seen[-1][1] != 1.0


def test_one_huge_gradient_weighs_on_later_steps_by_its_power() -> None:
    """What alpha does: after a spike of 1e4, the next step of size 1 is about 1 / (1e4^alpha + 1)^(1/alpha)."""
    spike = [torch.tensor([1e4], dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    for alpha in (1.1, 1.5, 2.0):
        first, second = run(lambda p, a=alpha: OverTheAirAdaGrad(p, 1.0, a, 0.0, 0.0), spike)
        assert (first - second).item() == pytest.approx((1e4**alpha + 1) ** (-1 / alpha), rel=1e-6)


@both
def test_half_precision_keeps_its_state_in_float32(kind: Kind) -> None:
    x = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = kind([x], 0.01, weight_decay=0.1)
    x.grad = torch.full((4,), 1e-3, dtype=torch.bfloat16)
    optimizer.step()
    assert {value.dtype for value in optimizer.state[x].values()} == {torch.float32}
    assert (x < 1).all()


@both
@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1, math.nan, True])
def test_alpha_outside_its_range(kind: Kind, alpha: float) -> None:
    with pytest.raises(InvalidArgument, match="alpha must be above 1 and at most 2, got"):
        kind([nn.Parameter(torch.ones(1))], 0.1, alpha)


def test_other_mistakes() -> None:
    x = nn.Parameter(torch.ones(1))
    with pytest.raises(InvalidArgument, match="lr must be >= 0"):
        OverTheAirAdaGrad([x], -0.1)
    with pytest.raises(InvalidArgument, match="eps must be >= 0"):
        OverTheAirAdam([x], 0.1, eps=-1.0)
    with pytest.raises(InvalidArgument, match="beta1 must be >= 0 and below 1, got 1"):
        OverTheAirAdaGrad([x], 0.1, beta1=1)
    with pytest.raises(InvalidArgument, match=r"betas\[1\] must be >= 0 and below 1"):
        OverTheAirAdam([x], 0.1, betas=(0.9, 1.0))
    with pytest.raises(TypeError, match="lr"):
        OverTheAirAdam([x])  # type: ignore[call-arg]
