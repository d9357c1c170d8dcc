"""AdaRankGrad through several switches against the equations in plain float64; only the bases are taken from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.optimizers import AdaRankGrad
from tests.optimizers.test_adarankgrad import generator, low_rank


def gradient(t: int) -> Tensor:
    """Of a rank that falls from 5 to 2, with a little noise; small at times, so that the tolerance is met."""
    noise = torch.randn(7, 9, generator=generator(90 + t), dtype=torch.float64)
    return (low_rank(7, 9, max(2, 5 - t // 4), seed=t // 3) + 0.01 * noise) * (0.2 if t % 7 == 4 else 1)


class Reference:
    """One (7, 9) matrix, entry by entry where moments change."""

    def __init__(self, start: Tensor, options: dict[str, Any]) -> None:
        self.x, self.o, self.t = start.clone(), options, 0
        self.m = self.v = self.basis = torch.zeros(0)

    def switch(self, basis: Tensor) -> None:
        """Before the step is counted: the moments have seen self.t steps."""
        if self.t:
            rows, m, v = basis.shape[1], self.m, self.v
            turn = basis.T @ self.basis
            kind = self.o["second_moment_map"]
            b1, b2 = 1 - 0.9**self.t, 1 - 0.95**self.t
            self.m, self.v = torch.zeros(2, rows, 9, dtype=torch.float64)
            for i in range(rows):
                for j in range(9):
                    if kind == "none":
                        self.m[i, j], self.v[i, j] = (m[i, j], v[i, j]) if i < len(m) else (0, 0)
                        continue
                    old = range(len(m))
                    self.m[i, j] = sum(float(turn[i, k] * m[k, j]) for k in old)
                    if kind == "squared":
                        self.v[i, j] = sum(float(turn[i, k] ** 2 * v[k, j]) for k in old)
                        continue
                    spread = sum(float(turn[i, k] ** 2 * (v[k, j] / b2 - (m[k, j] / b1) ** 2)) for k in old)
                    mean = sum(float(turn[i, k] * m[k, j] / b1) for k in old)
                    self.v[i, j] = b2 * max(0.0, spread + mean**2)
        else:
            self.m, self.v = torch.zeros(2, basis.shape[1], 9, dtype=torch.float64)
        self.basis = basis.clone()

    def step(self, grad: Tensor) -> None:
        self.t += 1
        g = self.basis.T @ (-grad if self.o["maximize"] else grad)
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.95 * self.v + 0.05 * g**2
        u = self.m / (1 - 0.9**self.t) / ((self.v / (1 - 0.95**self.t)).sqrt() + 1e-6)
        self.x = self.x * (1 - 0.02 * self.o["weight_decay"]) - 0.02 * 0.7 * self.basis @ u


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("kind", ["squared", "ldadam", "none"])
@pytest.mark.parametrize("more", [{}, {"maximize": True, "weight_decay": 0.3, "monotone_rank": False}], ids=str)
def test_equals_the_equations_through_switches(tall: bool, kind: str, more: dict[str, Any]) -> None:
    start = torch.randn(7, 9, generator=generator(), dtype=torch.float64)
    param = nn.Parameter((start.T if tall else start).clone())
    options = {"second_moment_map": kind, "maximize": False, "weight_decay": 0.0, **more}
    optimizer = AdaRankGrad(
        [param], lr=0.02, betas=(0.9, 0.95), eps=1e-6, scale=0.7, max_rank=6, max_residual_energy=0.01,
        max_inner_steps=3, switch_tolerance=0.9, switch_smoothing=0.5, **options,
    )  # fmt: skip
    reference, switches = Reference(start, options), 0
    for t in range(25):
        param.grad = (gradient(t).T if tall else gradient(t)).clone()
        optimizer.step()
        if len(optimizer.switch_log) > switches:
            switches = len(optimizer.switch_log)
            reference.switch(optimizer.state[param]["basis"])
        reference.step(gradient(t))
        found = param.detach().T if tall else param.detach()
        torch.testing.assert_close(found, reference.x, rtol=1e-9, atol=1e-11)
    assert {s.reason for s in optimizer.switch_log} == {"first", "tolerance", "cap"}
    assert len({s.new_rank for s in optimizer.switch_log}) > 2
