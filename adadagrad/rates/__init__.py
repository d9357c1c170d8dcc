"""Which learning rate goes with a batch size, and with the progress of a run; all in samples, no torch."""

from adadagrad.rates.accumulator import AccumulatorScale
from adadagrad.rates.adamscale import AdamScale
from adadagrad.rates.adascale import AdaScale
from adadagrad.rates.base import AbstractRate
from adadagrad.rates.legw import LEGW
from adadagrad.rates.power import LinearScaling, SquareRootScaling
from adadagrad.rates.schedules import ConstantSchedule, CosineSchedule, LinearSchedule, StepSchedule
from adadagrad.rates.seesaw import Seesaw

__all__ = [
    "LEGW",
    "AbstractRate",
    "AccumulatorScale",
    "AdaScale",
    "AdamScale",
    "ConstantSchedule",
    "CosineSchedule",
    "LinearScaling",
    "LinearSchedule",
    "Seesaw",
    "SquareRootScaling",
    "StepSchedule",
]
