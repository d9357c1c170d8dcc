"""One row a rule: factors worked out by hand, walks through a run, and what must be refused with which words.

Every row goes through all tests of test_rates.py: to add a rule, add a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from adadagrad.core.records import GradientStatistics
from adadagrad.core.step_scale import StepScale
from adadagrad.rates import (
    LEGW,
    AbstractRate,
    AccumulatorScale,
    AdamScale,
    AdaScale,
    LinearScaling,
    Seesaw,
    SquareRootScaling,
)


@dataclass(frozen=True)
class Visit:
    """One step of a walk: its batch over the base batch of 4, what was measured, and what must come out."""

    scale: float
    factor: float
    progress: float  # in base batches
    statistics: GradientStatistics | None = None


@dataclass(frozen=True)
class RateCase:
    """A rule, what it must answer, and what it must refuse."""

    rule: AbstractRate
    answers: tuple[tuple[StepScale, float], ...] = ()  # nothing measured yet
    walks: tuple[tuple[Visit, ...], ...] = ()
    bad_arguments: tuple[tuple[dict[str, Any], str], ...] = ()  # keyword arguments, part of the message
    one_at_base: bool = True  # whether the factor is 1 at scale 1 before anything has been measured


def at(scale: float, base: int = 4, **step: Any) -> StepScale:
    """A step of so many base batches."""
    assert scale * base == int(scale * base)
    return StepScale(global_batch_size=int(scale * base), base_batch_size=base, **step)


def noise(variance: float, norm_sq: float, scale: float = 1, base: int = 4) -> GradientStatistics:
    """What is measured where sigma^2 of the base batch and mu^2 are such, at a scale."""
    b, v = int(scale * base), variance * base
    return GradientStatistics(num_examples=b, grad_norm_sq=norm_sq + v / b, variance_trace=v)


BAD_BASE = (
    ({"base_batch_size": 0}, "base_batch_size must be >= 1, got 0"),
    ({"base_batch_size": 64.0}, "base_batch_size must be an integer, got 64.0: write int(...) around it"),
    ({"base_batch_size": True}, "base_batch_size must be an integer, got True"),
)
BAD_GAIN = (
    *BAD_BASE,
    ({"smoothing": 0.0}, "smoothing must be > 0, got 0.0"),
    ({"smoothing": 1.0}, "smoothing must be < 1, got 1.0"),
    ({"smoothing": math.nan}, "smoothing must be > 0, got nan"),
    ({"progress_in": "sample"}, "unknown progress_in 'sample': did you mean samples?"),
    ({"progress_in": None}, "unknown progress_in 'None'"),
)


def with_memory(bad: tuple[tuple[dict[str, Any], str], ...]) -> tuple[tuple[dict[str, Any], str], ...]:
    return tuple(({"memory": 1.0} | arguments, message) for arguments, message in bad)


GAIN_WALKS = (
    (  # measurements (sigma^2, mu^2) = (3, 1), (1, 3), hence means (2, 2)
        Visit(1, 1.0, 1.0),
        Visit(4, 1.0, 1.0),  # nothing measured yet
        Visit(4, 16 / 7, 16 / 7, noise(3.0, 1.0, 4)),  # 4 / (3/4 + 1)
        Visit(4, 1.6, 1.6, noise(1.0, 3.0, 4)),  # 4 / (2/4 + 2)
        Visit(8, 16 / 9, 16 / 9),  # 4 / (2/8 + 2)
        Visit(1.5, 1.2, 1.2),  # 4 / (4/3 + 2)
        Visit(1, 1.0, 1.0),
        Visit(0.5, 2 / 3, 2 / 3),  # 4 / (4 + 2)
        Visit(4, 1.6, 1.6, noise(math.nan, 1.0, 4)),  # ignored
        Visit(4, 1.6, 1.6, noise(1.0, math.inf, 4)),
        Visit(4, 1.6, 1.6, noise(1e101, 1.0, 4)),
    ),
    (Visit(4, 4.0, 4.0, noise(3.0, -0.5, 4)), Visit(1, 1.0, 1.0)),  # mu^2 clipped to 0
    (Visit(4, 4.0, 4.0, noise(-2.0, 0.0, 4)),),  # sigma^2 clipped to 1e-6
    (Visit(4, 1.6, 1.6, noise(0.0, 1e-6, 4)),),  # the same: 2 / (1/4 + 1)
    # clipped before it is averaged: mu^2 = (0 + 2) / 2, sigma^2 = 3; 4 / (3/4 + 1)
    (Visit(4, 4.0, 4.0, noise(3.0, -7.0, 4)), Visit(4, 16 / 7, 16 / 7, noise(3.0, 2.0, 4))),
    (  # at s = 500 the average is exponential from the third measurement on: sigma^2 = 4, 3, 6
        Visit(500, 500.0, 500.0, noise(4.0, 0.0, 500)),
        Visit(500, 4 / (3 / 500 + 1), 4 / (3 / 500 + 1), noise(2.0, 2.0, 500)),  # mu^2 = 1
        Visit(500, 11 / (6 / 500 + 5), 11 / (6 / 500 + 5), noise(9.0, 9.0, 500)),  # (3 + 9) / 2, (1 + 9) / 2
    ),
    (  # at s >= 1000 nothing is remembered
        Visit(2000, 2000.0, 2000.0, noise(4.0, 0.0, 2000)),
        Visit(2000, 2 / (1 / 2000 + 1), 2 / (1 / 2000 + 1), noise(1.0, 1.0, 2000)),
    ),
)


def changed(walks: tuple[tuple[Visit, ...], ...], factor: Any = None, progress: Any = None) -> Any:
    """The same walks with other factors (a function of the gain) or progress (a function of the scale)."""
    return tuple(
        tuple(
            Visit(
                visit.scale,
                factor(visit.factor) if factor else visit.factor,
                progress(visit.scale) if progress else visit.progress,
                visit.statistics,
            )
            for visit in walk
        )
        for walk in walks
    )


CASES = [
    RateCase(
        LinearScaling(),
        answers=((at(1), 1.0), (at(8), 8.0), (at(1.5), 1.5), (at(0.25), 0.25)),
        bad_arguments=BAD_BASE,
    ),
    RateCase(
        SquareRootScaling(base_batch_size=4),
        answers=((at(1), 1.0), (at(4), 2.0), (at(2.25), 1.5), (at(0.25), 0.5)),
        bad_arguments=BAD_BASE,
    ),
    RateCase(
        Seesaw(),
        answers=((at(1), 1.0), (at(4), 0.5), (at(16), 0.25), (at(0.25), 2.0)),
        bad_arguments=BAD_BASE,
    ),
    RateCase(
        LEGW(base_warmup_epochs=0.5),
        answers=(
            (at(1, progress=0, dataset_size=100), 0.0),
            (at(1, progress=25, dataset_size=100), 0.5),
            (at(1, progress=50, dataset_size=100), 1.0),
            (at(1, progress=5000, dataset_size=100), 1.0),
            (at(4, progress=0, dataset_size=100), 0.0),
            (at(4, progress=50, dataset_size=100), 0.5),  # 2 * 50 / 200
            (at(4, progress=200, dataset_size=100), 2.0),
            (at(0.25, progress=5, dataset_size=100), 0.2),  # 0.5 * 5 / 12.5
        ),
        bad_arguments=(
            ({"base_warmup_epochs": -1}, "base_warmup_epochs must be >= 0, got -1"),
            ({"base_warmup_epochs": math.inf}, "base_warmup_epochs must be >= 0, got inf"),
            ({"base_warmup_epochs": 1, "base_batch_size": 0}, "base_batch_size must be >= 1, got 0"),
        ),
        one_at_base=False,
    ),
    RateCase(
        LEGW(base_warmup_epochs=0, base_batch_size=4),
        answers=((at(1), 1.0), (at(4), 2.0), (at(4, progress=10), 2.0)),
    ),
    RateCase(AdaScale(), answers=((at(8), 1.0),), walks=GAIN_WALKS, bad_arguments=BAD_GAIN),
    RateCase(
        AdaScale(base_batch_size=4, smoothing=0.75, progress_in="samples"),
        walks=(
            (  # sigma^2 = 2 four times, then 2 + (6 - 2) / 4 = 3, then 3 + (7 - 3) / 4 = 4; mu^2 = 1
                *(Visit(4, 2.0, 4.0, noise(2.0, 1.0, 4)) for _ in range(4)),  # 3 / (2/4 + 1)
                Visit(4, 16 / 7, 4.0, noise(6.0, 1.0, 4)),
                Visit(4, 2.5, 4.0, noise(7.0, 1.0, 4)),  # 5 / (4/4 + 1)
            ),
            *changed(GAIN_WALKS[:5], progress=float),
        ),
    ),
    RateCase(
        AdamScale(),
        answers=((at(8), 1.0),),
        walks=changed(GAIN_WALKS, factor=math.sqrt),
        bad_arguments=(
            *BAD_GAIN,
            ({"power": -0.5}, "power must be between 0 and 1, got -0.5"),
            ({"power": 1.5}, "power must be between 0 and 1, got 1.5"),
        ),
    ),
    RateCase(AdamScale(power=1, smoothing=0.9), walks=GAIN_WALKS[:5]),
    RateCase(AdamScale(power=0, base_batch_size=4), walks=changed(GAIN_WALKS, factor=lambda r: 1.0)),
    RateCase(
        AccumulatorScale(memory=1.0),
        answers=((at(8), 1.0),),
        walks=(
            (  # (sigma^2, mu^2) = (3, 1): q_0 = 4; at s = 4 q = 7/4 and r = 16/7, so that r q_0 = 64/7
                Visit(4, 1.0, 16 / 7, noise(3.0, 1.0, 4)),  # 16/7 * sqrt((7/4) / (64/7)), and so on for ever
                Visit(4, 1.0, 16 / 7),
                Visit(1, math.sqrt((14 / 4 + 4) / (128 / 7 + 4)), 1.0),  # v holds two steps, v_0 more than four
            ),
            (  # a batch that grows late
                Visit(4, 1.0, 1.0),  # counted by neither accumulator
                Visit(1, 1.0, 1.0, noise(3.0, 1.0)),
                Visit(1, 1.0, 1.0),
                Visit(1, 1.0, 1.0),
                Visit(4, 16 / 7 * math.sqrt((12 + 7 / 4) / (12 + 64 / 7)), 16 / 7),
                Visit(4, 16 / 7 * math.sqrt((12 + 14 / 4) / (12 + 128 / 7)), 16 / 7),
            ),
        ),
        bad_arguments=(
            *with_memory(BAD_GAIN),
            ({"memory": 1.5}, "memory must be between 0 and 1, got 1.5"),
            ({"memory": -0.1}, "memory must be between 0 and 1, got -0.1"),
            ({"memory": math.nan}, "memory must be between 0 and 1, got nan"),
        ),
    ),
    RateCase(
        AccumulatorScale(memory=0.5, base_batch_size=4, progress_in="samples"),
        walks=(
            *changed(GAIN_WALKS[2:3], factor=math.sqrt, progress=float),
            (  # (sigma^2, mu^2) = (2, 0): q_0 = 2; at s = 2 q = 1 and r = 2
                Visit(1, 1.0, 1.0, noise(2.0, 0.0)),  # v = v_0 = 1 with the weight 1/2
                Visit(2, 2 * math.sqrt((1 / 0.75) / (1.75 / 0.875)), 2.0),  # v = 1/2 + 1/2, v_0 = 1/4 + 3/4 * 2
                Visit(1, math.sqrt((1.5 / 0.875) / (1.875 / 0.9375)), 1.0),  # v = 1/2 + 1, v_0 = 1.75/2 + 1
            ),
        ),
    ),
    RateCase(
        AccumulatorScale(memory=0.5, smoothing=0.01),
        walks=(
            (  # sigma^2 falls from 200 to 3.98: the formula says 4 sqrt(17.33 / 15.51), held at s
                Visit(4, 2.0, 4.0, noise(200.0, 0.0, 4)),
                Visit(4, 4.0, 4.0, noise(2.0, 0.0, 4)),
            ),
        ),
    ),
    RateCase(AccumulatorScale(memory=0), walks=changed(GAIN_WALKS, factor=math.sqrt)),
]
