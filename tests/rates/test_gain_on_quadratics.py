"""What the gain promises, where everything is known: one SGD step on a quadratic with noise of known covariance.

F(w) = 1/2 w' H w, and an example's gradient is H w plus noise of covariance Sigma. At batch b its mean has
E g = H w and E|g|^2 = |H w|^2 + tr Sigma / b.
"""

from __future__ import annotations

import math
import random

import pytest

from adadagrad.core.records import GradientStatistics
from adadagrad.core.step_scale import StepScale
from adadagrad.rates import AbstractRate, AccumulatorScale, AdamScale, AdaScale, LinearScaling

BASE, LR = 32, 0.01
CURVATURES = [0.5 + 0.01 * j for j in range(200)]  # the diagonal of H
VARIANCES = [4.0 if j % 3 else 0.1 for j in range(200)]  # the diagonal of Sigma
POSITION = [0.1 * math.sin(j) for j in range(200)]

MU_SQ = sum((h * w) ** 2 for h, w in zip(CURVATURES, POSITION, strict=True))
SIGMA_SQ = sum(VARIANCES) / BASE


def step_at(scale: float) -> StepScale:
    return StepScale(global_batch_size=int(scale * BASE), base_batch_size=BASE)


def expected_statistics(step: StepScale) -> GradientStatistics:
    """The mean of what is measured at a batch size."""
    b, trace = step.global_batch_size, sum(VARIANCES)
    return GradientStatistics(num_examples=b, grad_norm_sq=MU_SQ + trace / b, variance_trace=trace)


@pytest.mark.parametrize("scale", [1, 2.5, 8, 64])
def test_a_step_makes_its_gain_of_base_steps(scale: float) -> None:
    rule, step = AdaScale(), step_at(scale)
    state = rule.observe(rule.start(), expected_statistics(step), step)
    r, base_steps = rule.factor(state, step), rule.progress(state, step) / BASE
    assert r == pytest.approx((SIGMA_SQ + MU_SQ) / (SIGMA_SQ / scale + MU_SQ), rel=1e-12)
    # to first order, E F falls by lr |grad F|^2 in each unit of progress
    assert r * LR * MU_SQ / base_steps == pytest.approx(LR * MU_SQ, rel=1e-12)
    # to second order, by which E F rises at most, it is lr^2 L / 2 E|g|^2, L the largest curvature
    curvature = max(CURVATURES)
    raised = (r * LR) ** 2 * (SIGMA_SQ / scale + MU_SQ) * curvature / 2
    assert raised / base_steps == pytest.approx(LR**2 * (SIGMA_SQ + MU_SQ) * curvature / 2, rel=1e-12)


def mean_square(rule: AbstractRate, batches: list[int], base_steps: float) -> float:
    """E|w|^2 after so much progress in base steps, on F = |w|^2 / 2 in one dimension, |w_0| = 10, V = 64, b_0 = 1.

    E w_{t+1}^2 = (1 - f lr)^2 E w_t^2 + (f lr)^2 V / b: a recursion, not a sample.
    """
    square, progress, count, state = 100.0, 0.0, 0, rule.start()
    while progress < base_steps:
        step = StepScale(global_batch_size=batches[count % len(batches)], base_batch_size=1)
        b = step.global_batch_size
        statistics = GradientStatistics(num_examples=b, grad_norm_sq=square + 64.0 / b, variance_trace=64.0)
        state = rule.observe(state, statistics, step)
        rate = rule.factor(state, step) * 0.002
        square = (1 - rate) ** 2 * square + rate**2 * 64.0 / b
        progress += rule.progress(state, step)
        state, count = rule.advance(state, step), count + 1
    return square


@pytest.mark.parametrize("batches", [[2], [16], [64], [1, 64], [3, 40, 7]], ids=str)
def test_at_equal_progress_every_batch_size_has_come_equally_far(batches: list[int]) -> None:
    rule = AdaScale(smoothing=0.01)  # almost the statistics of the very step, which are exact here
    for base_steps in (200, 600, 3000):
        expected = mean_square(rule, [1], base_steps)
        assert mean_square(rule, batches, base_steps) == pytest.approx(expected, rel=0.1)


def test_linear_scaling_has_not() -> None:
    """The test above would see it: near the minimum the noise of s lr is more."""
    expected = mean_square(LinearScaling(), [1], 3000)
    assert mean_square(LinearScaling(), [512], 3000) > 1.5 * expected


class Accumulator:
    """What an optimizer divides by, step by step: a sum of squares, or their debiased average."""

    def __init__(self, memory: float) -> None:
        self.memory, self.value, self.weight = memory, 0.0, 0.0

    def add(self, square: float) -> float:
        if self.memory == 1:
            self.value, self.weight = self.value + square, 1.0
        else:
            self.value = self.memory * self.value + (1 - self.memory) * square
            self.weight = self.memory * self.weight + (1 - self.memory)
        return math.sqrt(self.value / self.weight)


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9, 0.999, 1 - 1e-12, 1.0])
def test_the_accumulator_rule_matches_base_steps_taken_one_by_one(memory: float) -> None:
    """Without a mean gradient r = s is whole, so that the base run can be walked: s of its steps for one of ours."""
    rule, draw = AccumulatorScale(memory=memory, smoothing=1e-9), random.Random(0)
    state, ours, base = rule.start(), Accumulator(memory), Accumulator(memory)
    for _ in range(300):
        scale, variance = draw.choice([1, 2, 8, 64]), 9.0
        step = step_at(scale)
        statistics = GradientStatistics(
            num_examples=step.global_batch_size, grad_norm_sq=variance / scale, variance_trace=variance * BASE
        )
        state = rule.observe(state, statistics, step)
        denominator = ours.add(variance / scale)
        for _ in range(scale):
            base_denominator = base.add(variance)
        # per unit of gradient: our step, and so many base steps
        expected = scale / base_denominator
        assert rule.factor(state, step) / denominator == pytest.approx(expected, rel=1e-6)
        state = rule.advance(state, step)


def walked(rule: AbstractRate, scales: list[float]) -> list[float]:
    """The factors of a run in which every step is measured, exactly."""
    state, factors = rule.start(), []
    for scale in scales:
        state = rule.observe(state, expected_statistics(step_at(scale)), step_at(scale))
        factors.append(rule.factor(state, step_at(scale)))
        state = rule.advance(state, step_at(scale))
    return factors


def test_limits_of_the_accumulator_rule() -> None:
    [r] = walked(AdaScale(), [8])
    [root] = walked(AdamScale(), [8])
    assert root == pytest.approx(math.sqrt(r))
    assert r > 1.5
    assert walked(AccumulatorScale(memory=1.0), [8] * 50) == pytest.approx([1.0] * 50)  # the sum does the scaling
    assert walked(AccumulatorScale(memory=0.99), [8] * 50) == pytest.approx([root] * 50)
    assert walked(AccumulatorScale(memory=0.0), [1, 1, 8, 8, 1]) == pytest.approx([1, 1, root, root, 1])
    for memory in (0.9999, 1.0):  # a batch that grows late
        late = walked(AccumulatorScale(memory=memory), [1] * 50_000 + [8])
        assert late[:-1] == pytest.approx([1.0] * 50_000)
        assert late[-1] == pytest.approx(r, rel=1e-2)
    settled = walked(AccumulatorScale(memory=0.9), [1] * 100 + [8] * 200)
    assert settled[-1] == pytest.approx(root)
    assert settled[100:] == sorted(settled[100:], reverse=True)
    back = walked(AccumulatorScale(memory=1.0), [8] * 100 + [1])
    assert back[-1] == pytest.approx(1 / r, rel=0.1)
