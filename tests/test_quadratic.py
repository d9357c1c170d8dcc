"""A quadratic with known covariance: what policies ask for and rates make of *measured* gradients is the closed form.

F(w) = |w - m|^2 / 2 with examples x_i ~ N(m, Sigma), Sigma diagonal, so that the gradient of example i at w is w - x_i,
its mean w - m, its covariance Sigma. Every number is estimated in GROUPS independent groups of STEPS steps each; their
mean must lie within four of its standard errors of what the formula gives for the true mean and covariance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.core.step_scale import StepScale
from adadagrad.policies.base import AbstractPolicy
from adadagrad.statistics.epoch_sums import EpochSums
from adadagrad.statistics.running import RunningStatistics

DIMENSION, BATCH, GROUPS, STEPS = 20, 16, 30, 200
SIGMA = torch.linspace(0.2, 3.0, DIMENSION, dtype=torch.float64)
"""Variances of the coordinates."""
SLOPE = torch.linspace(-0.3, 0.4, DIMENSION, dtype=torch.float64)
"""The true gradient w - m."""
V, G2 = float(SIGMA.sum()), float(SLOPE.square().sum())
ALONG = float((SIGMA * SLOPE.square()).sum())
"""Variance of <g_i, grad F>."""


def measured(generator: torch.Generator, size: int = BATCH) -> tuple[GradientStatistics, Tensor]:
    """One step's statistics by the definition, and its gradient."""
    units = SLOPE + SIGMA.sqrt() * torch.randn(size, DIMENSION, generator=generator, dtype=torch.float64)
    return ada.statistics_from_units(units), units.mean(0)


def averaged(group: int, size: int = BATCH) -> GradientStatistics:
    """The record of a long average."""
    generator, running = torch.Generator().manual_seed(group), RunningStatistics(0.9999)
    for _ in range(STEPS):
        found = running.update(measured(generator, size)[0], ())
    return found


def check(estimates: list[float], expected: float) -> None:
    error = stdev(estimates) / math.sqrt(len(estimates))
    assert error < 0.05 * abs(expected)  # else the test would say little
    assert abs(mean(estimates) - expected) < 4 * error


S = G2 + V / BATCH
"""Expected squared norm of a batch gradient."""
VP = ALONG + float(SIGMA.square().sum()) / BATCH
"""Expected Vp, for Gaussian examples: g^T Sigma g with E g g^T = grad F grad F^T + Sigma / b."""
REQUESTS: dict[str, tuple[AbstractPolicy, float]] = {
    "norm": (ada.NormTest(eta=0.5), V / (0.25 * S)),
    "noise scale": (ada.GradientNoiseScale(fraction=0.5), 0.5 * V / G2),
    "cabs": (ada.CABS(scale=2.0, loss_offset=0.5), 2.0 * 0.1 * (1 - 1 / BATCH) * V / 1.5),
}


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_a_policys_request_is_the_closed_form(name: str) -> None:
    policy, expected = REQUESTS[name]
    observations = [Observation(gradient=averaged(k), lr=0.1, loss=9.0, loss_average=2.0) for k in range(GROUPS)]
    check([policy.required_batch_size(o) for o in observations], expected)


def test_the_inner_product_tests_ask_for_the_closed_form() -> None:
    """Vp is measured with each step's own gradient, so its mean is that of the definition, not of a ratio."""
    products, squares = [], []
    for group in range(GROUPS):
        generator = torch.Generator().manual_seed(group)
        found = [measured(generator)[0] for _ in range(STEPS)]
        products.append(mean(f.inner_product_variance or 0.0 for f in found))
        squares.append(mean(f.grad_norm_sq for f in found))
    check(products, VP)
    check(squares, S)
    whole = GradientStatistics(
        num_examples=BATCH,
        grad_norm_sq=mean(squares),
        variance_trace=V,
        inner_product_variance=mean(products),
    )
    asked = ada.InnerProductTest(theta=0.9).required_batch_size(Observation(gradient=whole))
    assert asked == pytest.approx(VP / (0.81 * S**2), rel=0.05)
    augmented = ada.AugmentedInnerProductTest(theta=100.0, nu=0.5).required_batch_size(Observation(gradient=whole))
    assert augmented == pytest.approx((V - VP / S) / (0.25 * S), rel=0.05)


def test_the_coordinate_test_asks_for_the_closed_form_where_the_batch_is_large() -> None:
    """The largest V_j / g_j^2 is no mean: at 4,096 examples its bias is small beside its spread over groups."""
    estimates = []
    for group in range(GROUPS):
        generator = torch.Generator().manual_seed(group)
        units = 1.0 + SIGMA.sqrt() * torch.randn(4096, DIMENSION, generator=generator, dtype=torch.float64)
        ratio = float((units.var(0) / units.mean(0).square())[-1])
        found = GradientStatistics(num_examples=4096, grad_norm_sq=1.0, variance_trace=1.0, coordinate_ratio=ratio)
        estimates.append(ada.CoordinateNormTest(eta=0.5).required_batch_size(Observation(gradient=found)))
    check(estimates, 4 * float(SIGMA[-1]))


def test_divebatch_asks_for_the_closed_form() -> None:
    """Over an epoch of n examples at one point: N D = ((1 - 1/n) V + s) / s with E s = G2 + V/n."""
    n, estimates = STEPS * BATCH, []
    for group in range(GROUPS):
        generator, p = torch.Generator().manual_seed(group), nn.Parameter(torch.zeros(DIMENSION, dtype=torch.float64))
        sums, epoch = EpochSums(n), None
        while epoch is None:
            statistics, p.grad = measured(generator)
            epoch = sums.update(statistics, [p])
        estimates.append(ada.DiveBatch(delta=0.5).required_batch_size(Observation(gradient=epoch)))
    s = G2 + V / n
    check(estimates, 0.5 * ((1 - 1 / n) * V + s) / s)


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_big_batch_grows_just_where_noise_exceeds_the_signal(scale: int) -> None:
    b = BATCH * scale
    found = GradientStatistics(num_examples=b, grad_norm_sq=G2 + V / b, variance_trace=V)
    policy = ada.BigBatch(increment=5, eta=0.6)
    asked = policy.required_batch_size(Observation(gradient=found, global_batch_size=b))
    assert asked == b + (5 if V / b > 0.36 * (G2 + V / b) else 0)


RULES: dict[str, Callable[[float], float]] = {"AdaScale": lambda r: r, "AdamScale": math.sqrt}


@pytest.mark.parametrize("scale", [1, 4, 16, 64])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_gain_is_the_closed_form(rule: str, scale: int) -> None:
    step = StepScale(global_batch_size=4 * scale, base_batch_size=4)
    rate, estimates = getattr(ada, rule)(smoothing=0.999), []
    for group in range(GROUPS):
        generator, state = torch.Generator().manual_seed(group), rate.start()
        for _ in range(STEPS):
            state = rate.observe(state, measured(generator, size=64)[0], step)
        estimates.append(rate.factor(state, step))
    gain = (V / 4 + G2) / (V / 4 / scale + G2)
    if scale == 1:
        assert estimates == [1.0] * GROUPS
    else:
        check(estimates, RULES[rule](gain))


def test_adascales_progress_is_equal_across_scales() -> None:
    """Steps at every scale, run for the same progress from the same point, end with the same expected loss.

    lr is small, so that what the guarantee leaves out, second order in lr, is small beside what linear scaling errs by.
    """

    def end(scale: int, factor: float, steps: float, group: int) -> float:
        generator = torch.Generator().manual_seed(1000 * group + scale)
        w = SLOPE.clone() * 10  # w - m
        for _ in range(round(steps)):
            noise = (SIGMA / (4 * scale)).sqrt() * torch.randn(DIMENSION, generator=generator, dtype=torch.float64)
            w -= 0.002 * factor * (w + noise)
        return float(w.square().sum()) / 2

    g2, losses = 100 * G2, {}
    for scale in (1, 4, 16):
        gain = (V / 4 + g2) / (V / 4 / scale + g2)
        losses[scale] = mean(end(scale, gain, 100 / gain, group) for group in range(20))
    start = 50 * G2
    assert losses[1] < 0.75 * start
    for scale in (4, 16):
        assert losses[scale] == pytest.approx(losses[1], rel=0.01)
    free = mean(end(16, 16, 100 / ((V / 4 + g2) / (V / 4 / 16 + g2)), group) for group in range(20))
    assert free < 0.6 * losses[1]  # s times the rate for as many steps as the gain asks for is another curve
