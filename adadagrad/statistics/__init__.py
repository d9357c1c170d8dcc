"""What the noise of the gradient is, measured inside the backward that runs anyway."""

from __future__ import annotations

from adadagrad.statistics.choosing import choose_estimator
from adadagrad.statistics.meter import GradientMeter
from adadagrad.statistics.micro_batch import MicroBatch
from adadagrad.statistics.per_example import PerExample
from adadagrad.statistics.probe import Probe
from adadagrad.statistics.reference import statistics_from_units
from adadagrad.statistics.smoothing import ExponentialAverage
from adadagrad.statistics.worker import Worker

__all__ = [
    "ExponentialAverage",
    "GradientMeter",
    "MicroBatch",
    "PerExample",
    "Probe",
    "Worker",
    "choose_estimator",
    "statistics_from_units",
]
