"""adadagrad: training with batch sizes that the gradient itself chooses."""

from __future__ import annotations

from adadagrad.core.records import BatchPlan, Decision, GradientStatistics, Observation
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.core.settings import Bounds, Measure
from adadagrad.engine import AdaptiveBatch
from adadagrad.optimizers.adagrad_norm import AdaGradNorm
from adadagrad.policies import (
    AugmentedInnerProductTest,
    ConstantBatch,
    CoordinateNormTest,
    GeometricBatch,
    InnerProductTest,
    LinearBatch,
    NormTest,
    StagedBatch,
)
from adadagrad.rates import ConstantSchedule, CosineSchedule, LinearSchedule, StepSchedule
from adadagrad.statistics import GradientMeter, MicroBatch, PerExample, statistics_from_units
from adadagrad.version import __version__

__all__ = [
    "AdaGradNorm",
    "AdaptiveBatch",
    "AugmentedInnerProductTest",
    "BatchPlan",
    "Bounds",
    "ConstantBatch",
    "ConstantSchedule",
    "CoordinateNormTest",
    "CoordinateReduction",
    "CosineSchedule",
    "Decision",
    "GeometricBatch",
    "GradientMeter",
    "GradientStatistics",
    "InnerProductTest",
    "LinearBatch",
    "LinearSchedule",
    "Measure",
    "MicroBatch",
    "NormTest",
    "Observation",
    "PerExample",
    "StagedBatch",
    "StepSchedule",
    "__version__",
    "statistics_from_units",
]
