"""Learning rate schedules: values at their corners, bounds in between, refused arguments."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import LearningRateSchedule
from adadagrad.rates import ConstantSchedule, CosineSchedule, LinearSchedule, StepSchedule

SCHEDULES: list[LearningRateSchedule] = [
    ConstantSchedule(),
    CosineSchedule(warmup_samples=100, floor=0.1),
    LinearSchedule(warmup_samples=100, floor=0.5),
    StepSchedule({500: 0.1, 800: 0.01}),
    StepSchedule([800, 500], gamma=0.1),
]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (ConstantSchedule(), {0: 1.0, 1100: 1.0, 5000: 1.0}),
        (CosineSchedule(), {0: 1.0, 275: (1 + math.sqrt(0.5)) / 2, 550: 0.5, 1100: 0.0, 5000: 0.0}),
        (
            CosineSchedule(warmup_samples=100, floor=0.1),
            {0: 0.0, 1: 0.01, 50: 0.5, 100: 1.0, 350: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 600: 0.55, 1100: 0.1},
        ),
        (CosineSchedule(floor=1.0), {0: 1.0, 300: 1.0, 1100: 1.0}),
        (LinearSchedule(), {0: 1.0, 550: 0.5, 1100: 0.0, 5000: 0.0}),
        (
            LinearSchedule(warmup_samples=100, floor=0.5),
            {0: 0.0, 50: 0.5, 100: 1.0, 600: 0.75, 1100: 0.5, 5000: 0.5},
        ),
        (StepSchedule({500: 0.1, 800: 0.01}), {0: 1.0, 499: 1.0, 500: 0.1, 799: 0.1, 800: 0.01, 5000: 0.01}),
        (StepSchedule([(800, 0.01), (500, 0.1)]), {499: 1.0, 500: 0.1, 800: 0.01}),
        (StepSchedule([800, 500], gamma=0.5), {499: 1.0, 500: 0.5, 800: 0.25}),
        (StepSchedule({0: 2.0, 10: 0.0}), {0: 2.0, 9: 2.0, 10: 0.0}),
        (StepSchedule({}), {0: 1.0, 1100: 1.0}),
    ],
    ids=repr,
)
def test_values(schedule: LearningRateSchedule, values: dict[int, float]) -> None:
    for samples, expected in values.items():
        assert schedule(samples, 1100) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_is_a_frozen_value(schedule: Any) -> None:
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert copy(321, 1100) == schedule(321, 1100)


@settings(deadline=None)
@given(
    floor=st.floats(0, 1),
    warmup=st.integers(0, 900),
    samples=st.lists(st.floats(0, 3000), min_size=2, max_size=2),
    kind=st.sampled_from([CosineSchedule, LinearSchedule]),
)
def test_rises_then_falls_to_the_floor(floor: float, warmup: int, samples: list[float], kind: Any) -> None:
    schedule = kind(warmup_samples=warmup, floor=floor)
    early, late = sorted(samples)
    for samples_seen in samples:
        assert 0 <= schedule(samples_seen, 1000) <= 1
        if samples_seen >= warmup:
            assert schedule(samples_seen, 1000) >= floor - 1e-12
    if late < warmup:
        assert schedule(early, 1000) <= schedule(late, 1000)
    if early >= warmup:
        assert schedule(early, 1000) >= schedule(late, 1000) - 1e-12
    assert schedule(3000, 1000) == pytest.approx(floor)


@pytest.mark.parametrize("kind", [CosineSchedule, LinearSchedule])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_samples": -1}, "warmup_samples must be >= 0, got -1"),
        ({"floor": 1.5}, "floor must be between 0 and 1, got 1.5"),
        ({"floor": math.nan}, "floor must be between 0 and 1, got nan"),
    ],
)
def test_bad_arguments(kind: Any, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        kind(**arguments)


@pytest.mark.parametrize("kind", [CosineSchedule, LinearSchedule])
@pytest.mark.parametrize(
    ("samples", "total", "message"),
    [
        (0, 100, "warmup_samples must be < total_samples, got warmup_samples=100 and total_samples=100"),
        (0, 0, "total_samples must be > 0, got 0"),
        (-1, 1000, "samples_seen must be >= 0, got -1"),
    ],
)
def test_bad_calls(kind: Any, samples: int, total: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        kind(warmup_samples=100)(samples, total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"milestones": [100, 200]},
            "gamma must be given where milestones hold no factors, got the milestone 100",
        ),
        ({"milestones": [100, 200], "gamma": 0.0}, "gamma must be > 0, got 0.0"),
        ({"milestones": {100: 0.1}.items(), "gamma": 0.5}, "gamma needs milestones that are integers without"),
        ({"milestones": {-1: 0.1}}, "a milestone in milestones must be >= 0, got -1"),
        ({"milestones": {1.5: 0.1}}, "a milestone in milestones must be an integer, got 1.5"),
        ({"milestones": {100: -0.1}}, "a factor in milestones must be >= 0, got -0.1"),
        ({"milestones": [(100, 0.1), (100, 0.2)]}, "milestones must be different, got"),
        ({"milestones": [100, 100], "gamma": 0.5}, "milestones must be different, got"),
    ],
)
def test_bad_milestones(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        StepSchedule(**arguments)
