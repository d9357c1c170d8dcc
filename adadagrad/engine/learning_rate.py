"""The learning rate's one owner: a schedule in samples on every group's initial value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import LearningRateSchedule


class LearningRate:
    """Sets each parameter group's learning rate to its initial value times the schedule's factor.

    Always from the initial value, never by repeated multiplication, so that the rate at a number of samples does
    not depend on the batch sizes before.

    Args:
        optimizer: The optimizer; its groups' present rates are the initial ones.
        schedule: The factor as a function of samples, or None to leave the rate alone.
        total_samples: The run's budget, for the schedule.

    Raises:
        InvalidArgument: A torch scheduler is attached to the optimizer as well, or there is no rate to schedule.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: LearningRateSchedule | None, total_samples: int
    ) -> None:
        self._optimizer, self._schedule, self._total = optimizer, schedule, total_samples
        self._initial = [_rate(group) for group in optimizer.param_groups]
        if schedule is not None and any(math.isnan(rate) for rate in self._initial):
            raise InvalidArgument(
                f"lr_schedule needs a learning rate to scale, and {type(optimizer).__name__} has none: give the "
                "optimizer an lr, or leave lr_schedule out"
            )
        self._set: list[float] | None = None
        """The rates as last set here, to see whether somebody else has changed them."""
        if schedule is not None and getattr(optimizer.step, "_wrapped_by_lr_sched", False):
            raise InvalidArgument(
                "lr_schedule would be a second owner of the learning rate beside the torch scheduler that is attached "
                "to the optimizer: use one of the two"
            )
        if schedule is not None:
            schedule(0, total_samples)  # a schedule that does not fit the budget says so now, not after the run began

    @property
    def current(self) -> float:
        """Learning rate of the first parameter group; NaN for an optimizer that chooses its own."""
        return _rate(self._optimizer.param_groups[0])

    def set(self, samples_seen: int) -> None:
        """Set the rates for the step that starts here.

        Args:
            samples_seen: Examples whose update has been applied.

        Raises:
            InvalidArgument: Somebody else has changed a rate since the last step.
        """
        if self._schedule is None:
            return
        if self._set is not None and [float(group["lr"]) for group in self._optimizer.param_groups] != self._set:
            raise InvalidArgument(
                "the learning rate was changed between two steps, and lr_schedule would overwrite it: leave "
                "lr_schedule out to set the rate yourself"
            )
        factor = self._schedule(samples_seen, self._total)
        for group, initial in zip(self._optimizer.param_groups, self._initial, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(initial * factor)
            else:
                group["lr"] = initial * factor
        self._set = [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the initial rates."""
        return {"initial": list(self._initial)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the initial rates of another run.

        Args:
            state: What `state_dict` returned.
        """
        self._initial, self._set = [float(value) for value in state["initial"]], None


def _rate(group: dict[str, Any]) -> float:
    """Return a parameter group's learning rate, NaN where it has none (Adafactor with relative steps)."""
    rate = group.get("lr")
    return math.nan if rate is None else float(rate)
