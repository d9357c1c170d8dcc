"""Exact MARS where the second gradient of a batch is easily spoilt: casts kept by autocast, late parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adadagrad.optimizers import MARS
from adadagrad.optimizers.two_points import RandomStates, gradients_there


def small_model() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(6, 6), torch.randn(4, 6)


@pytest.mark.parametrize("around_step", [False, True])
def test_autocast_casts_the_earlier_parameters_anew(around_step: bool) -> None:
    """Around the whole step, autocast keeps its casts of the weights from one evaluation to the next."""
    model, x = small_model()
    optimizer = MARS(model.parameters(), lr=0.1, gamma=1.0, mode="exact", clip=False)

    def closure() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        return float(loss.detach())

    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around_step):
            optimizer.step(closure)
    other, _ = small_model()
    expected = MARS(other.parameters(), lr=0.1, gamma=1.0, mode="exact", clip=False)

    def evaluate() -> float:
        expected.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            loss = other(x).float().square().sum()
        loss.backward()
        return float(loss.detach())

    for _ in range(4):
        expected.step(evaluate)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_added_later_gets_the_gradient_of_the_present_point() -> None:
    """It has no earlier value, but the second evaluation writes to its gradient too."""
    p, q = (nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(2))
    optimizer = MARS([p], lr=0.5, mode="exact", clip=False, first_step="paper")

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p * q).square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    optimizer.add_param_group({"params": [q]})
    here = 2 * p.detach().square() * q.detach()
    optimizer.step(closure)
    assert q.grad is not None
    torch.testing.assert_close(q.grad, here)
    torch.testing.assert_close(optimizer.state[q]["exp_avg"], 0.05 * here)  # no correction at its first step
    before, now = optimizer.state[q]["previous_param"].clone(), q.detach().clone()
    optimizer.step(closure)
    assert not torch.equal(before, now)


def test_gradients_elsewhere_leave_parameters_gradients_and_random_numbers_alone() -> None:
    p, q = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    p.grad, mine = torch.tensor([7.0, 7.0]), []

    def closure() -> float:
        mine.append(torch.rand(()))
        loss = (p.square() * mine[-1]).sum()
        loss.backward()
        return float(loss.detach())

    random = RandomStates([p.device, q.device])
    first, second = torch.rand(()), torch.rand(())
    random.restore()
    assert torch.equal(torch.rand(()), first)
    found = gradients_there(closure, [p, q], [torch.tensor([5.0, 6.0]), q], random)
    assert torch.equal(mine[0], first)
    assert found[0] is not None
    torch.testing.assert_close(found[0], 2 * torch.tensor([5.0, 6.0]) * first)
    assert found[1] is None
    assert p.tolist() == [1.0, 2.0]
    assert p.grad is not None
    assert p.grad.tolist() == [7.0, 7.0]
    assert q.grad is None
    assert torch.equal(torch.rand(()), second)
