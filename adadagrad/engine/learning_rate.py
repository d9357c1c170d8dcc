"""The one owner of the learning rate: an initial value, times a schedule of progress, times a rule of the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import LearningRateRule, LearningRateSchedule
from adadagrad.core.records import GradientStatistics
from adadagrad.core.step_scale import StepScale


class LearningRate:
    """Sets each parameter group's learning rate to its initial value times the factors of schedule and rule.

    Always from the initial value, never by repeated multiplication, so that the schedule's part at a point of progress
    does not depend on the batch sizes before, and a batch that shrinks back has its old rate bit for bit. A step goes
    through `begin`, `measured` (where it was) and `advance` (once the optimizer has stepped); what the rule remembers
    is replaced in `advance` only, so that a step which is given up leaves no trace.

    Args:
        optimizer: The optimizer; its groups' present rates are the initial ones.
        schedule: The factor as a function of progress, or None.
        rule: The factor that goes with the batch size, or None.
        first_batch_size: Examples of the first step: the base batch size where the rule names none.
        dataset_size: N, for the rule.
        total_samples: The run's budget, for the schedule.

    Raises:
        InvalidArgument: A torch scheduler is attached to the optimizer as well, or there is no rate to set.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: LearningRateSchedule | None,
        rule: LearningRateRule | None,
        *,
        first_batch_size: int,
        dataset_size: int,
        total_samples: int,
    ) -> None:
        self._optimizer, self._schedule, self.rule, self._total = optimizer, schedule, rule, total_samples
        self._initial = [_rate(group) for group in optimizer.param_groups]
        owner = "lr_schedule" if schedule is not None else "rate" if rule is not None else None
        self._owner = owner
        if owner is not None and any(math.isnan(rate) for rate in self._initial):
            raise InvalidArgument(
                f"{owner} needs a learning rate to scale, and {type(optimizer).__name__} has none: give the "
                f"optimizer an lr, or leave {owner} out"
            )
        self._set: list[float] | None = None
        """The rates as last set here, to see whether somebody else has changed them."""
        if owner is not None and getattr(optimizer.step, "_wrapped_by_lr_sched", False):
            raise InvalidArgument(
                f"{owner} would be a second owner of the learning rate beside the torch scheduler that is attached "
                "to the optimizer: use one of the two"
            )
        if schedule is not None:
            schedule(0, total_samples)  # a schedule that does not fit the budget says so now, not after the run began
        base = None if rule is None else rule.base_batch_size
        self.base_batch_size = first_batch_size if base is None else base
        self.progress: float = 0
        """Where the run stands, in examples: what the schedule and the end of training read."""
        self.factor = 1.0
        """The rule's factor in the present step."""
        self._dataset_size = dataset_size
        self._state = self._pending = {} if rule is None else rule.start()
        self._step = self._scale(first_batch_size)

    @property
    def current(self) -> float:
        """Learning rate of the first parameter group; NaN for an optimizer that chooses its own."""
        return _rate(self._optimizer.param_groups[0])

    @property
    def counts_progress(self) -> bool:
        """Whether progress is the rule's own, so that training does not end after so many examples."""
        return self.rule is not None and self.rule.counts_progress

    def begin(self, size: int) -> None:
        """Set the rates for the step that starts here, as far as they are known before it is measured.

        Args:
            size: Its examples.

        Raises:
            InvalidArgument: Somebody else has changed a rate since the last step.
        """
        self._step, self._pending = self._scale(size), self._state
        if self._set is not None and [float(group["lr"]) for group in self._optimizer.param_groups] != self._set:
            raise InvalidArgument(
                f"the learning rate was changed between two steps, and {self._owner} would overwrite it: leave "
                f"{self._owner} out to set the rate yourself"
            )
        self._apply()

    def measured(self, statistics: GradientStatistics) -> None:
        """Let the rule see the step's own measurement, and set the rates of its update.

        Args:
            statistics: What the step has shown, not averaged.
        """
        if self.rule is not None and self.rule.needs:
            self._pending = self.rule.observe(self._state, statistics, self._step)
            self._apply()

    def advance(self) -> None:
        """Count the step: its update has been applied."""
        if self.rule is None:
            self.progress += self._step.global_batch_size
            return
        made = self.rule.progress(self._pending, self._step)
        self._state = self.rule.advance(self._pending, self._step)
        self.progress += made if self.rule.counts_progress else self._step.global_batch_size

    def take_back(self, samples: int) -> None:
        """Uncount examples of updates that were left out on some ranks, unless the rule counts by itself.

        Args:
            samples: How many.
        """
        if not self.counts_progress:
            self.progress -= samples

    def state_dict(self) -> dict[str, Any]:
        """Return the initial rates, the progress and what the rule remembers."""
        return {
            "initial": list(self._initial),
            "progress": self.progress,
            "base_batch_size": self.base_batch_size,
            "name": self._name,
            "rule": dict(self._state),
        }

    def refuse_other(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a run whose rates or progress meant something else.

        Args:
            state: What `state_dict` returned, or a version of this library that knew no rules yet.

        Raises:
            InvalidArgument: It is that of another rule, or of the same one with another base batch.
        """
        if state.get("name") != self._name or set(state.get("rule", {})) != set(self._state):
            raise InvalidArgument(
                f"state was saved under another learning-rate rule than {self.rule!r}: give the engine the same rate"
            )
        own = None if self.rule is None else self.rule.base_batch_size
        if own is not None and own != state["base_batch_size"]:
            raise InvalidArgument(
                f"state was saved with base_batch_size={state['base_batch_size']}, and {self.rule!r} has {own}: give "
                "the engine the same rate"
            )

    def load_state_dict(self, state: Mapping[str, Any], *, samples_seen: int) -> None:
        """Take over the state of another run.

        Args:
            state: What `state_dict` returned, not one that `refuse_other` refuses.
            samples_seen: The progress, where the state does not say.
        """
        self._initial, self._set = [float(value) for value in state["initial"]], None
        self.progress = state.get("progress", samples_seen)
        self.base_batch_size = state.get("base_batch_size", self.base_batch_size)
        self._state = self._pending = dict(state.get("rule", {}))

    @property
    def _name(self) -> str | None:
        """What tells rules apart whose memory looks alike: the class, and whether progress is its own."""
        if self.rule is None:
            return None
        return f"{type(self.rule).__name__}{', counting progress' * self.rule.counts_progress}"

    def _scale(self, size: int) -> StepScale:
        return StepScale(
            global_batch_size=size,
            base_batch_size=self.base_batch_size,
            progress=self.progress,
            dataset_size=self._dataset_size,
        )

    def _apply(self) -> None:
        """Write initial value times both factors into every group, unless the rate is somebody else's."""
        if self._owner is None:
            return
        self.factor = 1.0 if self.rule is None else self.rule.factor(self._pending, self._step)
        planned = 1.0 if self._schedule is None else self._schedule(self.progress, self._total)
        for group, initial in zip(self._optimizer.param_groups, self._initial, strict=True):
            value = initial * planned * self.factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        self._set = [float(group["lr"]) for group in self._optimizer.param_groups]


def _rate(group: dict[str, Any]) -> float:
    """Return a parameter group's learning rate, NaN where it has none (Adafactor with relative steps)."""
    rate = group.get("lr")
    return math.nan if rate is None else float(rate)
