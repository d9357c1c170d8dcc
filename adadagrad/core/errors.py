"""Every error that the library raises on purpose, one class per remedy.

All derive from `AdadagradError`; those about a bad argument are also `ValueError`, so that code which
catches the built-in keeps working. The message names the argument and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdadagradError(Exception):
    """Base of all errors raised by this library."""


class InvalidArgument(AdadagradError, ValueError):
    """An argument is outside its range, or contradicts another one."""


class UnknownName(InvalidArgument):
    """A name that is in no table; the message lists the nearest known ones.

    Args:
        what: What the name should have named, for example ``"policy"``.
        name: The name that was given.
        known: The names that exist.
    """

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        super().__init__(f"unknown {what} {name!r}: {hint}known: {', '.join(names)}")


class EmptyDataset(InvalidArgument):
    """The data set holds no example."""


class UnsizedDataset(InvalidArgument):
    """The data set has no length, where one is needed to place examples and to count epochs."""


class OverriddenSampler(InvalidArgument):
    """A loader's own sampler or batch sampler would be silently replaced by the engine's order."""


class BatchShapeError(AdadagradError):
    """A leaf of a batch cannot be sliced along its first dimension, or two chunks cannot be joined."""


class InvalidData(AdadagradError):
    """A data file or folder does not exist, is truncated, or is not what its header says."""


class BatchCoupledModule(AdadagradError):
    """A module mixes examples (BatchNorm in training mode): a per-example gradient does not exist."""


class UncoveredParameter(AdadagradError):
    """A parameter received a gradient that no rule can attribute to examples."""


class LeftoverGradients(AdadagradError):
    """Gradients from an earlier backward are still there, so a measurement would describe their sum."""


class InvalidMeasurement(AdadagradError):
    """Statistics were asked of a measurement that did not happen or that failed."""


class StepError(AdadagradError):
    """The parts of a training step were called in an order that would corrupt it."""


class LossWithoutGradient(StepError):
    """The loss does not require grad, so a backward would do nothing."""


class RanksDisagree(AdadagradError):
    """The processes that share a run have come apart: they are not at the same step with the same plan."""


class OutOfMemory(AdadagradError):
    """A step has run out of memory and cannot be repeated in smaller micro-batches from where it stands."""


class NonFiniteGradient(AdadagradError):
    """A loss or gradient is NaN or infinite and the run was told to stop there."""


class CorruptCheckpoint(AdadagradError):
    """A checkpoint file is empty, truncated, damaged, or of an unknown version."""


class CorruptLog(AdadagradError):
    """A run.jsonl holds a line that is not a record."""


class MissingExtra(AdadagradError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it.

    Args:
        package: The module that could not be imported.
        extra: The extra of this library that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'adadagrad[{extra}]'")
