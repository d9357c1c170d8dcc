"""One row a policy: answers worked out by hand, and what must be refused with which words.

Every row goes through all tests of test_policies.py: to add a policy, add a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.policies import (
    CABS,
    AbstractPolicy,
    AugmentedInnerProductTest,
    BigBatch,
    ConstantBatch,
    CoordinateNormTest,
    DiveBatch,
    GeometricBatch,
    GradientNoiseScale,
    InnerProductTest,
    LinearBatch,
    NormTest,
    RecordedBatch,
    StagedBatch,
)


@dataclass(frozen=True)
class PolicyCase:
    """A policy, what it must answer, and what it must refuse."""

    policy: AbstractPolicy
    answers: tuple[tuple[Observation, float], ...]
    bad_arguments: tuple[tuple[dict[str, Any], str], ...] = ()  # keyword arguments, part of the message
    bad_observations: tuple[tuple[Observation, str], ...] = ()
    scaled: Callable[[float], AbstractPolicy] | None = None  # the same for a loss times c, where a field has its units


def measured(
    s: float,
    v: float,
    vp: float | None = None,
    ratio: float | None = None,
    b: int = 8,
    **observation: Any,
) -> Observation:
    """The observation of a measured step: s = |g|^2, V, Vp, max V_j/g_j^2, b examples."""
    statistics = GradientStatistics(
        num_examples=b, grad_norm_sq=s, variance_trace=v, inner_product_variance=vp, coordinate_ratio=ratio
    )
    return Observation(gradient=statistics, **observation)


def seen(samples: int) -> Observation:
    return Observation(samples_seen=samples)


CASES = [
    PolicyCase(
        NormTest(eta=0.5),
        answers=(
            (measured(4.0, 9.0), 9.0),  # 9 / (0.25 * 4)
            (measured(1.0, 1.0), 4.0),
            (measured(4.0, 0.0), 0.0),  # all examples agree
            (measured(0.0, 9.0), math.inf),  # zero gradient
            (measured(0.0, 0.0), math.nan),
            (measured(4.0, math.nan), math.nan),  # one example has no variance
            (measured(math.nan, 9.0), math.nan),
            (measured(math.inf, math.inf), math.nan),
        ),
        bad_arguments=(
            ({"eta": -1.0}, "eta must be > 0, got -1.0"),
            ({"eta": 0}, "eta must be > 0, got 0"),
            ({"eta": math.nan}, "eta must be > 0, got nan"),
            ({"eta": "0.5"}, "eta must be > 0, got '0.5'"),
            ({"finite_population": "solve"}, "unknown finite_population 'solve': did you mean solved?"),
        ),
        bad_observations=((Observation(loss=1.0), "NormTest needs observation.gradient, got None"),),
    ),
    PolicyCase(
        NormTest(eta=0.5, finite_population="current"),
        answers=(
            (measured(4.0, 9.0, b=11, dataset_size=21), 4.5),  # 9 * (21 - 11) / 20
            (measured(4.0, 9.0, b=11, global_batch_size=16, dataset_size=21), 2.25),  # the whole step counts
            (measured(4.0, 9.0, b=21, dataset_size=21), 0.0),  # the whole data set has no noise
            (measured(4.0, 9.0, b=30, dataset_size=21), 0.0),
            (measured(4.0, 9.0, b=1, dataset_size=1), 0.0),
            (measured(0.0, 9.0, b=11, dataset_size=21), math.inf),
            (measured(4.0, math.nan, b=1, dataset_size=21), math.nan),
        ),
        bad_observations=(
            (measured(4.0, 9.0), 'finite_population="current" needs observation.dataset_size, got None'),
        ),
    ),
    PolicyCase(
        NormTest(eta=0.5, finite_population="solved"),
        answers=(
            (measured(4.0, 9.0, dataset_size=10), 5.0),  # 10 * 9 / (9 + 9)
            (measured(4.0, 9.0, dataset_size=1), 1.0),
            (measured(4.0, 0.0, dataset_size=1), 0.0),
            (measured(1e-12, 9.0, dataset_size=10), 10.0),  # never above N
            (measured(0.0, 9.0, dataset_size=10), math.inf),
        ),
        bad_observations=((measured(4.0, 9.0), 'finite_population="solved" needs observation.dataset_size, got None'),),
    ),
    PolicyCase(
        InnerProductTest(theta=0.5),
        answers=(
            (measured(4.0, 9.0, vp=32.0), 8.0),  # 32 / (0.25 * 16)
            (measured(2.0, 9.0, vp=1.0), 1.0),
            (measured(4.0, 9.0, vp=0.0), 0.0),
            (measured(0.0, 9.0, vp=1.0), math.inf),
            (measured(0.0, 9.0, vp=0.0), math.nan),
            (measured(4.0, 9.0, vp=math.nan), math.nan),
            (measured(1e200, 9.0, vp=1e300), 0.0),  # s^2 would overflow
        ),
        bad_arguments=(
            ({"theta": 0.0}, "theta must be > 0, got 0.0"),
            ({"finite_population": "on"}, "unknown finite_population 'on'"),
        ),
        bad_observations=(
            (
                measured(4.0, 9.0),
                "InnerProductTest needs observation.gradient.inner_product_variance, got None",
            ),
        ),
    ),
    PolicyCase(
        InnerProductTest(theta=0.5, finite_population="solved"),
        answers=((measured(4.0, 9.0, vp=32.0, dataset_size=9), 4.5),),  # 9 * 8 / (8 + 8)
    ),
    PolicyCase(
        AugmentedInnerProductTest(theta=0.5, nu=1.0),
        answers=(
            (measured(4.0, 9.0, vp=4.0), 2.0),  # along 4 / 4 = 1; across (9 - 1) / 4 = 2
            (measured(4.0, 9.0, vp=32.0), 8.0),  # along 32 / 4 = 8; across (9 - 8) / 4 = 0.25
            (measured(4.0, 9.0, vp=36.0), 9.0),  # all of the noise is along g
            (measured(0.0, 9.0, vp=1.0), math.inf),
            (measured(0.0, 0.0, vp=0.0), math.nan),
            (measured(4.0, 9.0, vp=math.nan), math.nan),
            (measured(4.0, math.nan, vp=4.0), math.nan),
        ),
        bad_arguments=(
            ({"theta": -0.9}, "theta must be > 0, got -0.9"),
            ({"nu": 0.0}, "nu must be > 0, got 0.0"),
            ({"finite_population": "N"}, "unknown finite_population 'N'"),
        ),
        bad_observations=(
            (
                measured(4.0, 9.0),
                "AugmentedInnerProductTest needs observation.gradient.inner_product_variance, got None",
            ),
        ),
    ),
    PolicyCase(
        AugmentedInnerProductTest(theta=0.5, nu=1.0, finite_population="current"),
        answers=((measured(4.0, 9.0, vp=4.0, b=3, dataset_size=9), 1.5),),  # 2 * (9 - 3) / 8
    ),
    PolicyCase(
        CoordinateNormTest(eta=0.5),
        answers=(
            (measured(4.0, 9.0, ratio=16.0), 64.0),
            (measured(4.0, 9.0, ratio=math.inf), math.inf),
            (measured(4.0, 9.0, ratio=math.nan), math.nan),
        ),
        bad_arguments=(
            ({"eta": -0.1}, "eta must be > 0, got -0.1"),
            ({"reduction": "maximum"}, "unknown reduction 'maximum'"),
            ({"reduction": "quantile"}, 'quantile must be given for reduction="quantile"'),
            ({"quantile": 0.9}, 'quantile belongs to reduction="quantile", got reduction="max"'),
            ({"reduction": "quantile", "quantile": 1.5}, "quantile must be between 0 and 1, got 1.5"),
            ({"finite_population": "yes"}, "unknown finite_population 'yes'"),
        ),
        bad_observations=(
            (measured(4.0, 9.0), "CoordinateNormTest needs observation.gradient.coordinate_ratio, got None"),
        ),
    ),
    PolicyCase(
        CoordinateNormTest(eta=0.5, reduction="quantile", quantile=0.9, finite_population="current"),
        answers=((measured(4.0, 9.0, ratio=16.0, b=9, dataset_size=17), 32.0),),  # 64 * (17 - 9) / 16
    ),
    PolicyCase(
        GradientNoiseScale(fraction=0.5),
        answers=(
            (measured(5.0, 16.0), 8 / 3),  # 16 / (5 - 16/8) / 2
            (measured(5.0, 16.0, b=4, global_batch_size=99), 8.0),  # 16 / (5 - 16/4) / 2
            (measured(5.0, 0.0), 0.0),  # no noise
            (measured(2.0, 16.0), math.inf),  # nothing but noise: 2 - 16/8
            (measured(1.0, 16.0), math.inf),  # less than noise: 1 - 16/8
            (measured(0.0, 0.0), math.nan),  # no gradient at all
            (measured(5.0, math.nan), math.nan),
            (measured(math.nan, 16.0), math.nan),
            (measured(math.inf, math.inf), math.nan),
        ),
        bad_arguments=(
            ({"fraction": 0.0}, "fraction must be > 0, got 0.0"),
            ({"averaging": 0.0}, "averaging must be > 0, got 0.0"),
            ({"averaging": 1.0}, "averaging must be < 1, or None for each step by itself, got 1.0"),
            ({"averaging": "epoch"}, "averaging must be > 0, got 'epoch'"),
        ),
    ),
    PolicyCase(
        CABS(scale=2.0, loss_offset=0.5, averaging=0.9),
        answers=(
            (measured(4.0, 16.0, lr=0.25, loss=1.0), 14.0),  # 2 * 0.25 * (7/8 * 16) / (1 - 0.5)
            (measured(4.0, 16.0, b=1, lr=0.25, loss=1.0), 0.0),  # one example does not differ from itself
            (measured(4.0, 16.0, lr=0.25, loss=9.0, loss_average=1.0), 14.0),  # the average is preferred
            (measured(4.0, 16.0, lr=0.25, loss=9.0, loss_average=0.0), math.inf),
            (measured(4.0, 16.0, lr=0.25, loss=0.5), math.inf),  # at the floor
            (measured(4.0, 16.0, lr=0.25, loss=0.1), math.inf),  # below it
            (measured(4.0, 0.0, lr=0.25, loss=0.5), math.nan),
            (measured(4.0, 0.0, lr=0.25, loss=1.0), 0.0),
            (measured(4.0, 16.0, lr=0.0, loss=1.0), 0.0),
            (measured(4.0, 16.0, lr=0.25, loss=math.nan), math.nan),
            (measured(4.0, math.nan, lr=0.25, loss=1.0), math.nan),
        ),
        bad_arguments=(
            ({"scale": -1.0}, "scale must be > 0, got -1.0"),
            ({"loss_offset": math.inf}, "loss_offset must be a finite number, got inf"),
            ({"loss_offset": "0"}, "loss_offset must be a finite number, got '0'"),
            ({"averaging": -0.5}, "averaging must be > 0, got -0.5"),
            ({"averaging": 1.5}, "averaging must be < 1, or None"),
        ),
        bad_observations=(
            (measured(4.0, 16.0, loss=1.0), "CABS needs observation.lr, got None"),
            (measured(4.0, 16.0, lr=0.25), "CABS needs observation.loss, got None"),
        ),
        scaled=lambda c: CABS(scale=2.0, loss_offset=0.5 * c, averaging=0.9),
    ),
    PolicyCase(
        DiveBatch(delta=0.5),
        answers=(
            (measured(4.0, 16.0), 2.25),  # (7/8 * 16 + 4) / 4 / 2
            (measured(2.0, 16.0), 4.0),  # pure noise of 8 examples: (14 + 2) / 2 / 2, half of the 8
            (measured(4.0, 0.0), 0.5),  # all examples agree: N D = 1
            (measured(4.0, 16.0, b=1), 0.5),
            (measured(0.0, 16.0), math.inf),
            (measured(0.0, 0.0), math.nan),
            (measured(4.0, math.nan), math.nan),
        ),
        bad_arguments=(({"delta": 0}, "delta must be > 0, got 0"), ({"delta": math.inf}, "delta must be > 0, got inf")),
    ),
    PolicyCase(
        BigBatch(increment=4, eta=0.5),
        answers=(
            (measured(4.0, 9.0, global_batch_size=8), 12.0),  # 9/8 > 1/4 * 4
            (measured(4.0, 9.0, global_batch_size=9), 9.0),  # 9/9 is not > 1
            (measured(4.0, 9.0, global_batch_size=16), 16.0),
            (measured(4.0, 9.0, b=8), 12.0),  # the record's examples are the step's
            (measured(4.0, 0.0, global_batch_size=8), 8.0),
            (measured(0.0, 9.0, global_batch_size=8), 12.0),
            (measured(0.0, 0.0, global_batch_size=8), math.nan),
            (measured(4.0, math.nan, global_batch_size=8), math.nan),
            (measured(math.nan, 9.0, global_batch_size=8), math.nan),
        ),
        bad_arguments=(
            ({"increment": 0}, "increment must be >= 1, got 0"),
            ({"increment": 8.0}, "increment must be an integer, got 8.0: write int(...) around it"),
            ({"increment": 8, "eta": 0.0}, "eta must be > 0, got 0.0"),
        ),
    ),
    PolicyCase(
        ConstantBatch(256),
        answers=((Observation(global_batch_size=8), 256.0), (Observation(), 256.0)),
        bad_arguments=(
            ({"global_batch_size": 0}, "global_batch_size must be >= 1, got 0"),
            ({"global_batch_size": 2.5}, "global_batch_size must be an integer, got 2.5"),
        ),
    ),
    PolicyCase(
        ConstantBatch(),
        answers=((Observation(global_batch_size=8), 8.0), (Observation(global_batch_size=9), 9.0)),
        bad_observations=((Observation(), "ConstantBatch needs observation.global_batch_size, got None"),),
    ),
    PolicyCase(
        StagedBatch("0:256 1M:1024"),
        answers=((seen(0), 256.0), (seen(999_999), 256.0), (seen(1_000_000), 1024.0), (seen(10**9), 1024.0)),
        bad_arguments=(
            ({"stages": ""}, "stages must be like \"0:256 1M:1024\", got the entry ''"),
            ({"stages": "0:256 1M"}, "got the entry '1M' in '0:256 1M'"),
            ({"stages": "0:256 1X:512"}, "stages must hold numbers such as 256, 2.4B or 100k, got '1X'"),
            ({"stages": "0:256 -5:512"}, "got '-5'"),
            ({"stages": "0:256 1e6:512"}, "got '1e6'"),
            ({"stages": "0:256 1::512"}, "got ':512'"),
            ({"stages": "0:1.5"}, "stages must hold whole numbers, got '1.5' = 1.5 in the entry '0:1.5'"),
            ({"stages": "1K:256"}, "stages must begin at threshold 0, got 1000: add an entry such as 0:256"),
            ({"stages": []}, "stages must begin at threshold 0, got no stage at all"),
            ({"stages": "0:256 1K:512 1000:1024"}, "stages must have different thresholds, got 1000 twice"),
            ({"stages": "0:0"}, "a batch size in stages must be >= 1, got 0"),
            ({"stages": {0: 256, -1: 512}}, "a threshold in stages must be >= 0, got -1"),
            ({"stages": {0: 256, 1e6: 512}}, "a threshold in stages must be an integer, got 1000000.0"),
            ({"stages": [(0, 256, 3)]}, "stages must be pairs (samples_seen, global_batch_size)"),
            ({"stages": [0, 256]}, "stages must be pairs (samples_seen, global_batch_size), got 0"),
        ),
    ),
    PolicyCase(
        RecordedBatch(((0, 16), (16, 24), (64, 9))),
        answers=(
            (seen(0), 16.0),
            (seen(15), 16.0),
            (seen(16), 24.0),
            (seen(63), 24.0),
            (seen(64), 9.0),
            (seen(9999), 9.0),
        ),
        bad_arguments=(
            ({"plan": ()}, "plan must begin at 0 samples seen, got no pair at all"),
            ({"plan": ((8, 16),)}, "plan must begin at 0 samples seen, got 8"),
            ({"plan": ((0, 16), (16, 24), (16, 32))}, "samples_seen in plan must increase, got 16 after 16"),
            ({"plan": ((0, 0),)}, "a batch size in plan must be >= 1, got 0"),
            ({"plan": ((0, 16), (-1, 8))}, "samples_seen in plan must be >= 0, got -1"),
            ({"plan": ((0, 16.0),)}, "a batch size in plan must be an integer, got 16.0"),
            ({"plan": "run.jsonl"}, "plan must be pairs (samples_seen, global_batch_size), got 'run.jsonl': "),
            ({"plan": ((0, 16, 3),)}, "plan must be pairs (samples_seen, global_batch_size), got ((0, 16, 3),)"),
        ),
    ),
    PolicyCase(
        LinearBatch(start=32, end=128, ramp_samples=3000, increment=32),
        answers=((seen(0), 32.0), (seen(999), 32.0), (seen(1000), 64.0), (seen(2999), 96.0), (seen(3000), 128.0)),
        bad_arguments=(
            ({"start": 0, "end": 8, "ramp_samples": 10}, "start must be >= 1, got 0"),
            ({"start": 16, "end": 8, "ramp_samples": 10}, "end must be >= start, got end=8 and start=16"),
            ({"start": 4, "end": 8, "ramp_samples": 0}, "ramp_samples must be >= 1, got 0"),
            ({"start": 4, "end": 8, "ramp_samples": 10, "increment": 0}, "increment must be >= 1, got 0"),
            (
                {"start": 4, "end": 8, "ramp_samples": 10, "increment": 3},
                "reached from start in whole increments, got end=8, start=4 and increment=3: take end=7, or end=10",
            ),
        ),
    ),
    PolicyCase(
        GeometricBatch(start=64, factor=1.5, every_samples=1000, end=200),
        answers=((seen(0), 64.0), (seen(999), 64.0), (seen(1000), 96.0), (seen(2000), 144.0), (seen(3000), 200.0)),
        bad_arguments=(
            ({"start": 0, "factor": 2, "every_samples": 10}, "start must be >= 1, got 0"),
            ({"start": 4, "factor": 1.0, "every_samples": 10}, "factor must be > 1, got 1.0"),
            ({"start": 4, "factor": -2, "every_samples": 10}, "factor must be > 0, got -2"),
            ({"start": 4, "factor": 2, "every_samples": 0}, "every_samples must be >= 1, got 0"),
            ({"start": 4, "factor": 2, "every_samples": 10, "end": 3}, "end must be >= start, got end=3"),
        ),
    ),
]
