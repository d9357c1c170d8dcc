"""What a policy remembers: statistics and the loss combined over steps, kept here so that policies have no state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from adadagrad.core.records import GradientStatistics
from adadagrad.statistics.combining import combination


class Averaging:
    """Combines the statistics of measured steps, and the loss of all steps, over the steps that a policy asks for.

    Args:
        averaging: What the policy says; see `AbstractPolicy.averaging`. None hands a step's statistics on.
        dataset_size: N, the length of an epoch.

    Raises:
        InvalidArgument: `averaging` is no decay in (0, 1), ``"epoch"`` or None.
    """

    def __init__(self, averaging: float | Literal["epoch"] | None, dataset_size: int) -> None:
        self.over, self._dataset_size = averaging, dataset_size
        self._combination = combination(averaging, dataset_size)
        self._loss, self._weight = 0.0, 0.0
        self._before: dict[str, Any] | None = None

    def begin(self) -> None:
        """Remember the state before a step, for `undo`."""
        self._before = self.state_dict()

    def combine(
        self, statistics: GradientStatistics, parameters: Iterable[nn.Parameter]
    ) -> tuple[GradientStatistics | None, str]:
        """Take in a measured step.

        Args:
            statistics: What was measured in it.
            parameters: The model's, with the step's mean gradient before clipping.

        Returns:
            What the policy is to read and ``""``, or None and why there is nothing yet.
        """
        if self._combination is None:
            return statistics, ""
        combined = self._combination.update(statistics, parameters)
        return combined, "" if combined is not None else "within the epoch"

    def loss(self, value: float) -> float | None:
        """Take in the loss of an applied step.

        Args:
            value: The step's mean loss; passed over where it is not finite, because no rank has made an update.

        Returns:
            Its average, or None where the policy asks for no running average, or there is none yet.
        """
        if not isinstance(self.over, float):
            return None
        if math.isfinite(value):
            self._loss = self.over * self._loss + (1 - self.over) * value
            self._weight = self.over * self._weight + (1 - self.over)
        return self._loss / self._weight if self._weight else None

    def undo(self) -> None:
        """Go back to where the step in progress began."""
        if self._before is not None:
            self.load_state_dict(self._before)

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered; no later step changes it."""
        combined = None if self._combination is None else self._combination.state_dict()
        return {"over": self.over, "statistics": combined, "loss": [self._loss, self._weight]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; from nothing where that was combined in another way, under another policy.

        Args:
            state: What `state_dict` returned.
        """
        if type(state["over"]) is not type(self.over):
            self._combination = combination(self.over, self._dataset_size)
            self._loss, self._weight = 0.0, 0.0
        elif self._combination is not None:
            self._combination.load_state_dict(state["statistics"])
            self._loss, self._weight = state["loss"]
