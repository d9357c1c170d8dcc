"""What combines the statistics of several steps into one record: an average over steps, or the sums over an epoch."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any

from torch import nn

from adadagrad.core.records import GradientStatistics


class AbstractCombination(abc.ABC):
    """Takes in one measured step after the other, and gives the record that a policy reads in the place of the step's.

    What it remembers is replaced at every update and never changed in place, so that a state taken before a step costs
    nothing, and undoes the step when it is loaded again.
    """

    @abc.abstractmethod
    def update(self, statistics: GradientStatistics, parameters: Iterable[nn.Parameter]) -> GradientStatistics | None:
        """Take in a measured step.

        Args:
            statistics: What was measured in it.
            parameters: The model's, the same ones in the same order at every step; `.grad` holds the step's mean
                gradient before clipping.

        Returns:
            The combined record; None while there is nothing to say yet.
        """

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered: plain numbers, words and tensors, which no later update changes."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, exactly.

        Args:
            state: What `state_dict` returned, of the same kind of combination.
        """
