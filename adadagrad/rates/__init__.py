"""Which learning rate goes with the progress of a run; all in samples."""

from adadagrad.rates.schedules import ConstantSchedule, CosineSchedule, LinearSchedule, StepSchedule

__all__ = ["ConstantSchedule", "CosineSchedule", "LinearSchedule", "StepSchedule"]
