"""adadagrad: training with batch sizes that the gradient itself chooses.

A name is imported when it is first used, so that what needs no torch (policies, records, the report, the command's
help) does not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from adadagrad.version import __version__

if TYPE_CHECKING:
    from adadagrad.core.records import BatchPlan, Decision, GradientStatistics, Observation
    from adadagrad.core.reduction import CoordinateReduction
    from adadagrad.core.settings import Bounds, Measure
    from adadagrad.engine import AdaptiveBatch
    from adadagrad.engine.recommended import recommended
    from adadagrad.local_sgd import LocalSGD
    from adadagrad.optimizers.adagrad_norm import AdaGradNorm
    from adadagrad.optimizers.adarankgrad import AdaRankGrad
    from adadagrad.optimizers.extrapolated_adam import ExtrapolatedAdam
    from adadagrad.optimizers.extrapolated_sgd import ExtrapolatedSGD
    from adadagrad.optimizers.lamadam import LaMAdam
    from adadagrad.optimizers.madam import MAdam
    from adadagrad.optimizers.mars import MARS
    from adadagrad.optimizers.mars_m import MARSM
    from adadagrad.optimizers.over_the_air import OverTheAirAdaGrad, OverTheAirAdam
    from adadagrad.optimizers.sift import SIFT
    from adadagrad.policies import (
        CABS,
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
    from adadagrad.rates import (
        LEGW,
        AccumulatorScale,
        AdamScale,
        AdaScale,
        ConstantSchedule,
        CosineSchedule,
        LinearScaling,
        LinearSchedule,
        Seesaw,
        SquareRootScaling,
        StepSchedule,
    )
    from adadagrad.statistics import (
        ExponentialAverage,
        GradientMeter,
        MicroBatch,
        PerExample,
        Probe,
        Worker,
        statistics_from_units,
    )

__all__ = [
    "CABS",
    "LEGW",
    "MARS",
    "MARSM",
    "SIFT",
    "AccumulatorScale",
    "AdaGradNorm",
    "AdaRankGrad",
    "AdaScale",
    "AdamScale",
    "AdaptiveBatch",
    "AugmentedInnerProductTest",
    "BatchPlan",
    "BigBatch",
    "Bounds",
    "ConstantBatch",
    "ConstantSchedule",
    "CoordinateNormTest",
    "CoordinateReduction",
    "CosineSchedule",
    "Decision",
    "DiveBatch",
    "ExponentialAverage",
    "ExtrapolatedAdam",
    "ExtrapolatedSGD",
    "GeometricBatch",
    "GradientMeter",
    "GradientNoiseScale",
    "GradientStatistics",
    "InnerProductTest",
    "LaMAdam",
    "LinearBatch",
    "LinearScaling",
    "LinearSchedule",
    "LocalSGD",
    "MAdam",
    "Measure",
    "MicroBatch",
    "NormTest",
    "Observation",
    "OverTheAirAdaGrad",
    "OverTheAirAdam",
    "PerExample",
    "Probe",
    "RecordedBatch",
    "Seesaw",
    "SquareRootScaling",
    "StagedBatch",
    "StepSchedule",
    "Worker",
    "__version__",
    "recommended",
    "statistics_from_units",
]

_HOMES = {
    "core.records": ("BatchPlan", "Decision", "GradientStatistics", "Observation"),
    "core.reduction": ("CoordinateReduction",),
    "core.settings": ("Bounds", "Measure"),
    "engine": ("AdaptiveBatch",),
    "engine.recommended": ("recommended",),
    "local_sgd": ("LocalSGD",),
    "optimizers.adagrad_norm": ("AdaGradNorm",),
    "optimizers.adarankgrad": ("AdaRankGrad",),
    "optimizers.extrapolated_adam": ("ExtrapolatedAdam",),
    "optimizers.extrapolated_sgd": ("ExtrapolatedSGD",),
    "optimizers.lamadam": ("LaMAdam",),
    "optimizers.madam": ("MAdam",),
    "optimizers.mars": ("MARS",),
    "optimizers.mars_m": ("MARSM",),
    "optimizers.over_the_air": ("OverTheAirAdaGrad", "OverTheAirAdam"),
    "optimizers.sift": ("SIFT",),
    "policies": (
        "CABS",
        "AugmentedInnerProductTest",
        "BigBatch",
        "ConstantBatch",
        "CoordinateNormTest",
        "DiveBatch",
        "GeometricBatch",
        "GradientNoiseScale",
        "InnerProductTest",
        "LinearBatch",
        "NormTest",
        "RecordedBatch",
        "StagedBatch",
    ),
    "rates": (
        "AccumulatorScale",
        "AdaScale",
        "AdamScale",
        "ConstantSchedule",
        "CosineSchedule",
        "LEGW",
        "LinearScaling",
        "LinearSchedule",
        "Seesaw",
        "SquareRootScaling",
        "StepSchedule",
    ),
    "statistics": (
        "ExponentialAverage",
        "GradientMeter",
        "MicroBatch",
        "PerExample",
        "Probe",
        "Worker",
        "statistics_from_units",
    ),
}
"""The same once more for the interpreter, which does not execute the imports above: names by their module."""

_HOME = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # where a checker sees this function, it takes every misspelt name for a known one

    def __getattr__(name: str) -> object:
        """Import a public name, or a package of this library, at its first use."""
        if name in _HOME:
            value = getattr(import_module(f"adadagrad.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        if name in {home.partition(".")[0] for home in _HOMES}:
            return import_module(f"adadagrad.{name}")
        raise AttributeError(f"module 'adadagrad' has no attribute {name!r}", name=name, obj=import_module(__name__))


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
