"""Stages made by a rule: Smith et al., Seesaw, and the critical batch size warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import LearningRateSchedule
from adadagrad.core.records import Observation
from adadagrad.policies import StagedBatch
from adadagrad.policies.cuts import cuts
from adadagrad.rates import ConstantSchedule, CosineSchedule, LinearSchedule, StepSchedule

TOTAL = 3000


def size(policy: StagedBatch, samples: int) -> float:
    return policy.required_batch_size(Observation(samples_seen=samples))


def scanned(schedule: LearningRateSchedule, start: int, factor: float) -> Iterator[float]:
    """The size at every number of examples, straight from the definition of Seesaw."""
    values = [schedule(t, TOTAL) for t in range(TOTAL)]
    top = values.index(max(values))
    for t, value in enumerate(values):
        k = 0
        while t >= top and value <= factor ** -(k + 1) * (1 + 1e-9) and start * factor ** (k + 1) <= TOTAL:
            k += 1
        yield round(start * factor**k)


@pytest.mark.parametrize("factor", [1.1, 2.0, 5.0])
@pytest.mark.parametrize(
    "schedule",
    [
        CosineSchedule(),
        CosineSchedule(floor=0.1),
        CosineSchedule(warmup_samples=1, floor=0.1),
        CosineSchedule(warmup_samples=1234, floor=0.01),
        LinearSchedule(warmup_samples=2, floor=0.0),
        LinearSchedule(warmup_samples=2998, floor=0.3),
        StepSchedule([500, 1000, 2500], gamma=0.1),
        StepSchedule([1000, 1700], gamma=0.5),
        StepSchedule({0: 0.2, 100: 1.0, 900: 0.04, 1200: 0.0}),
        ConstantSchedule(),
    ],
    ids=repr,
)
def test_seesaw_is_what_a_slow_scan_gives(schedule: LearningRateSchedule, factor: float) -> None:
    policy = StagedBatch.seesaw(schedule, start=7, total_samples=TOTAL, factor=factor)
    assert [size(policy, t) for t in range(TOTAL)] == list(scanned(schedule, 7, factor))


def test_seesaw_by_hand() -> None:
    """A straight line from 1 to 0 over 3000 is at 1/2, 1/4, ... at 1500, 2250, ...; no stage exceeds the budget."""
    policy = StagedBatch.seesaw(LinearSchedule(), start=100, total_samples=3000)
    assert policy.stages == ((0, 100), (1500, 200), (2250, 400), (2625, 800), (2813, 1600))


def test_seesaw_takes_the_cuts_of_a_step_schedule_where_they_are() -> None:
    """0.1 * 0.1 is above 0.01 in floating point, and still the second cut by ten."""
    policy = StagedBatch.seesaw(StepSchedule([500, 1000], gamma=0.1), start=1, total_samples=2000, factor=10)
    assert policy.stages == ((0, 1), (500, 10), (1000, 100))


def test_cuts_of_a_budget_that_cannot_be_scanned() -> None:
    found = list(islice(cuts(CosineSchedule(warmup_samples=10**9), total_samples=10**13, factor=2.0), 3))
    progress = [math.acos(2 * level - 1) / math.pi for level in (1 / 2, 1 / 4, 1 / 8)]
    assert found == pytest.approx([10**9 + (10**13 - 10**9) * p for p in progress], rel=1e-6)


@pytest.mark.parametrize("places", [[100, 200, 300, 400], [400, 100, 300, 200]])
def test_smith_keeps_the_noise_of_the_run_that_it_replaces(places: list[int]) -> None:
    """With the cuts that are left, lr / b is at every moment that of the run that only cuts its learning rate."""
    policy = StagedBatch.smith(64, places, factor=4.0, dataset_size=12_000)
    assert policy.stages == ((0, 64), (100, 256), (200, 1024))  # 4096 > 1200
    left = StepSchedule([place for place in places if place not in dict(policy.stages)], gamma=1 / 4)
    baseline = StepSchedule(places, gamma=1 / 4)
    for t in range(0, 500, 50):
        assert left(t, 500) / size(policy, t) == pytest.approx(baseline(t, 500) / 64)


def test_smith_stops_at_a_tenth_of_the_data() -> None:
    assert StagedBatch.smith(10, [5, 6], factor=2, dataset_size=400).stages == ((0, 10), (5, 20), (6, 40))
    assert StagedBatch.smith(10, [5, 6], factor=2, dataset_size=399).stages == ((0, 10), (5, 20))
    assert StagedBatch.smith(10, [5, 6], factor=1e300, dataset_size=400).stages == ((0, 10),)
    assert StagedBatch.smith(10, [5, 6], factor=1.55, dataset_size=400).stages == ((0, 10), (5, 16), (6, 24))


def test_the_critical_batch_must_have_passed_twice_the_size() -> None:
    """The shape of the OLMo run: 1024, 2048 from 168 on, 4096 from 503 on (in billions of tokens there)."""
    measured = {0: 2000.0, 100: 2048, 168: 2049, 300: 1000, 400: 4096, 503: 4100}
    assert StagedBatch.critical_batch(1024, measured).stages == ((0, 1024), (168, 2048), (503, 4096))
    assert StagedBatch.critical_batch(8, dict(reversed(measured.items()))).stages[0] == (0, 1024)
    assert StagedBatch.critical_batch(8, {}) == StagedBatch({0: 8})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StagedBatch.smith(0, [5], factor=2, dataset_size=9), "start must be >= 1, got 0"),
        (lambda: StagedBatch.smith(1, [5], factor=1.0, dataset_size=9), "factor must be > 1, got 1.0"),
        (lambda: StagedBatch.smith(1, [5], factor=2, dataset_size=0), "dataset_size must be >= 1, got 0"),
        (lambda: StagedBatch.smith(1, [0], factor=2, dataset_size=9), "a milestone in milestones must be >= 1, got 0"),
        (
            lambda: StagedBatch.smith(1, [5, 5], factor=2, dataset_size=99),
            "stages must have different thresholds, got 5 twice",
        ),
        (lambda: seesaw(start=2.5), "start must be an integer, got 2.5"),
        (lambda: seesaw(total_samples=0), "total_samples must be >= 1, got 0"),
        (lambda: seesaw(factor=0.5), "factor must be > 1, got 0.5"),
        (
            lambda: seesaw(StepSchedule({0: 0.5})),
            "schedule must rise above 1 / factor = 0.5 of the initial learning rate, got at most 0.5",
        ),
        (lambda: StagedBatch.critical_batch(-1, {}), "start must be >= 1, got -1"),
        (lambda: StagedBatch.critical_batch(1, {-1: 5.0}), "a number of examples in measured must be >= 0, got -1"),
        (lambda: StagedBatch.critical_batch(1, {0: 0.0}), "a critical batch size in measured must be > 0, got 0.0"),
    ],
)
def test_refused(make: Callable[[], StagedBatch], message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        make()
    assert message in str(error.value)


def seesaw(schedule: LearningRateSchedule = CosineSchedule(), **arguments: Any) -> StagedBatch:  # noqa: B008
    return StagedBatch.seesaw(schedule, **({"start": 1, "total_samples": 100} | arguments))
