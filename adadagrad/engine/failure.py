"""How a measurement fails, so that all ranks know of one that has failed on any, and none waits for its numbers."""

from __future__ import annotations

import enum

from adadagrad.core.errors import AdadagradError, BatchCoupledModule, InvalidMeasurement, UncoveredParameter

_STEP = 1 << 20
"""What a rank whose estimator does not fit counts for in a sum over ranks: more than all others could."""


class Failure(enum.IntEnum):
    """What has become of a step's measurement, from good to bad."""

    NONE = 0
    FAILED = 1
    """There are no statistics this time."""
    UNFIT = 2
    """The estimator cannot measure this model: ``"auto"`` goes over to another one."""

    @classmethod
    def of(cls, error: Exception | None) -> Failure:
        """Return the failure that an error means.

        Args:
            error: The error, None for none.
        """
        if error is None:
            return cls.NONE
        return cls.UNFIT if isinstance(error, UncoveredParameter | BatchCoupledModule) else cls.FAILED

    @property
    def count(self) -> float:
        """A number whose sum over ranks tells `worst` of them."""
        return float((0, 1, _STEP)[self])

    @classmethod
    def worst(cls, total: float) -> Failure:
        """Return the worst failure of all ranks.

        Args:
            total: Sum of their `count`.
        """
        return cls.UNFIT if total >= _STEP else cls.FAILED if total else cls.NONE

    def elsewhere(self) -> AdadagradError:
        """Return the error of a rank that has not failed itself."""
        if self is Failure.UNFIT:
            return UncoveredParameter("another rank cannot measure the model with this estimator; see its message")
        return InvalidMeasurement("the measurement of another rank has failed")
