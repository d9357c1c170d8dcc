"""Batch size schedules beyond the table: the string form, exact integer ramps, very long runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Observation
from adadagrad.policies import AbstractPolicy, GeometricBatch, LinearBatch, StagedBatch
from adadagrad.rates import StepSchedule


def size(policy: AbstractPolicy, samples: int) -> float:
    return policy.required_batch_size(Observation(samples_seen=samples))


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("0:256", ((0, 256),)),
        ("0:256 1M:1024", ((0, 256), (10**6, 1024))),
        ("0:256,1m:1k", ((0, 256), (10**6, 1000))),
        (" 0:256 ,\t1M:1024\n", ((0, 256), (10**6, 1024))),
        ("1M:1024 0:256", ((0, 256), (10**6, 1024))),  # sorted
        ("0:1024 1M:256", ((0, 1024), (10**6, 256))),  # decreasing is allowed
        ("0:768 250B:1536 500B:3072", ((0, 768), (250 * 10**9, 1536), (500 * 10**9, 3072))),
        (
            "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536",
            (
                (0, 16),
                (2_400_000_000, 320),
                (4_800_000_000, 624),
                (7_200_000_000, 928),
                (9_600_000_000, 1232),
                (12_000_000_000, 1536),
            ),
        ),
        ("0:0.5k .5T:2.K", ((0, 500), (5 * 10**11, 2000))),
        ("0:256 8.1M:512", ((0, 256), (8_100_000, 512))),
    ],
)
def test_megatron_strings(text: str, stages: tuple[tuple[int, int], ...]) -> None:
    policy = StagedBatch(text)
    assert policy.stages == stages
    assert policy == StagedBatch(dict(stages)) == StagedBatch(stages) == StagedBatch(iter(reversed(stages)))


def test_stages_can_shrink() -> None:
    policy = StagedBatch("0:1024 100:256")
    assert [size(policy, t) for t in (0, 99, 100, 101)] == [1024, 1024, 256, 256]
    assert policy.monotone is False


@settings(deadline=None)
@given(
    increments=st.integers(0, 50),
    increment=st.integers(1, 20),
    ramp=st.integers(1, 10_000),
    samples=st.integers(0, 20_000),
)
def test_linear_is_a_staircase_between_its_ends(increments: int, increment: int, ramp: int, samples: int) -> None:
    policy = LinearBatch(start=3, end=3 + increments * increment, ramp_samples=ramp, increment=increment)
    now, then = size(policy, samples), size(policy, samples + 1)
    assert policy.start <= now <= then <= policy.end
    assert (now - policy.start) % increment == 0
    assert size(policy, 0) == policy.start
    assert size(policy, ramp) == policy.end
    ideal = policy.start + (policy.end - policy.start) * min(samples / ramp, 1)
    assert ideal - increment - 1e-9 <= now <= ideal + 1e-9


def test_linear_increments_are_equally_long() -> None:
    policy = LinearBatch(start=1, end=4, ramp_samples=9)
    assert [size(policy, t) for t in range(10)] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_geometric_without_an_end_stays_finite() -> None:
    policy = GeometricBatch(start=64, factor=2, every_samples=1)
    assert [size(policy, t) for t in range(4)] == [64, 128, 256, 512]
    assert math.isfinite(size(policy, 10**9))  # so that the cap applies, not the rule for infinite requests
    assert size(policy, 10**9) > 1e200
    assert size(GeometricBatch(start=64, factor=1 + 1e-15, every_samples=1), 1) == pytest.approx(64)


def test_adabatch_stage_by_stage() -> None:
    """Twice the batch every 20 epochs; with the learning rate x 0.75 that goes with it, lr / b falls by 0.375."""
    policy = GeometricBatch.adabatch(start=128, dataset_size=1000)
    schedule = StepSchedule(range(20_000, 100_000, 20_000), gamma=0.75)
    for stage, expected in enumerate([128, 256, 512, 1024, 2048]):
        for samples in (20_000 * stage, 20_000 * stage + 19_999):
            assert size(policy, samples) == expected
            assert schedule(samples, 100_000) / expected == pytest.approx(0.375**stage / 128)
    other = GeometricBatch.adabatch(64, 1000, every_epochs=5, factor=1.5, end=200)
    assert other == GeometricBatch(start=64, factor=1.5, every_samples=5000, end=200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_size": 0}, "dataset_size must be >= 1, got 0"),
        ({"every_epochs": 2.5}, "every_epochs must be an integer, got 2.5"),
        ({"factor": 1}, "factor must be > 1, got 1"),
        ({"end": 7}, "end must be >= start, got end=7 and start=8"),
    ],
)
def test_adabatch_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        GeometricBatch.adabatch(**({"start": 8, "dataset_size": 100} | arguments))
    assert message in str(error.value)
