"""The two hyperbolas, by hand, and what they must be of each other."""

from __future__ import annotations

import math

import pytest

from adadagrad.report.tradeoff import samples_over_least, samples_ratio, steps_over_least, steps_ratio


@pytest.mark.parametrize(
    ("noise_scale", "batch_size", "steps", "samples"),
    [
        (100, 100, 2.0, 2.0),
        (100, 25, 5.0, 1.25),
        (100, 400, 1.25, 5.0),
        (0, 64, 1.0, math.inf),
        (math.inf, 64, math.inf, 1.0),
    ],
)
def test_steps_and_samples_over_the_least(noise_scale: float, batch_size: int, steps: float, samples: float) -> None:
    assert steps_over_least(noise_scale, batch_size) == steps
    assert samples_over_least(noise_scale, batch_size) == samples


@pytest.mark.parametrize("batch_size", [1, 30, 900])
def test_the_hyperbola(batch_size: int) -> None:
    steps, samples = steps_over_least(70, batch_size), samples_over_least(70, batch_size)
    assert (steps - 1) * (samples - 1) == pytest.approx(1)


@pytest.mark.parametrize("factor", [2, 4, 8, 0.5])
@pytest.mark.parametrize("noise_scale", [1.0, 70.0, 1e4])
def test_ratios_are_quotients_of_the_hyperbolas(noise_scale: float, factor: float) -> None:
    steps = steps_over_least(noise_scale, factor * 64) / steps_over_least(noise_scale, 64)
    samples = samples_over_least(noise_scale, factor * 64) / samples_over_least(noise_scale, 64)
    assert steps_ratio(noise_scale, 64, factor) == pytest.approx(steps)
    assert samples_ratio(noise_scale, 64, factor) == pytest.approx(samples)


def test_ratios_by_hand_and_where_noise_is_all_or_nothing() -> None:
    assert steps_ratio(64, 64, 2) == 0.75  # (1 + 1/2) / (1 + 1)
    assert samples_ratio(64, 64, 4) == 2.5  # (1 + 4) / (1 + 1)
    assert (steps_ratio(math.inf, 64, 4), samples_ratio(math.inf, 64, 4)) == (0.25, 1.0)
    assert (steps_ratio(0, 64, 4), samples_ratio(0, 64, 4)) == (1.0, 4.0)
