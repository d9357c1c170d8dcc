"""The scale that a float16 run puts on its loss, so that small gradients do not vanish: when it falls, when it grows.

A `torch.amp.GradScaler` is the user's choice of a scale and of how it moves. Its own ``step`` is not used: whether a
gradient is finite is found once, over all shards and ranks, where every other step finds it too, so that ranks agree
and any optimizer goes with it. What moves the scale is read from the scaler and written back to it, by its state.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch

from adadagrad.core.errors import InvalidArgument
from adadagrad.parallel import AbstractParallel

SMALLEST = 1.0
"""Scale at and below which a gradient that is not finite is no fault of the scale."""


@final
class LossScale:
    """A scaler at work, or the scale 1 where there is none.

    Args:
        scaler: The user's; None, or one that is not enabled, scales nothing.
        parallel: How a step runs.

    Raises:
        InvalidArgument: It is no `torch.amp.GradScaler`, or the ranks take local steps.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None, parallel: AbstractParallel) -> None:
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise InvalidArgument(
                f'grad_scaler must be a torch.amp.GradScaler, for example torch.amp.GradScaler("cuda"), got {scaler!r}'
            )
        if scaler is not None and scaler.is_enabled() and parallel.gradient == "local":
            raise InvalidArgument(
                "grad_scaler would move apart on ranks that take local steps: train in bfloat16, which needs none, or "
                "with DistributedDataParallel"
            )
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def enabled(self) -> bool:
        """Whether losses are scaled at all."""
        return self._scaler is not None

    @property
    def factor(self) -> float:
        """By how much a loss is multiplied before its backward."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def is_overflow(self, loss: float, factor: float) -> bool:
        """Return whether a gradient that is not finite is the scale's fault.

        Args:
            loss: The step's mean loss, without the scale.
            factor: The scale it was differentiated under.
        """
        return self._scaler is not None and math.isfinite(loss) and factor > SMALLEST

    def move(self, *, finite: bool) -> None:
        """Lower the scale after a step that is left out for its sake; raise it after so many that were not.

        Args:
            finite: Whether the step's gradient was finite; False only where `is_overflow` says that it is to blame.
        """
        if self._scaler is None:
            return
        state = self._scaler.state_dict()
        if not finite:
            state["scale"] *= state["backoff_factor"]
            state["_growth_tracker"] = 0
        elif state["_growth_tracker"] + 1 == state["growth_interval"]:
            grown = state["scale"] * state["growth_factor"]
            state["scale"] = grown if math.isfinite(grown) else state["scale"]
            state["_growth_tracker"] = 0
        else:
            state["_growth_tracker"] += 1
        self._scaler.load_state_dict(state)

    def log_fields(self) -> dict[str, float]:
        """Return the scale that the next step will have; nothing without a scaler."""
        return {} if self._scaler is None else {"loss_scale": self.factor}

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler's state, as plain numbers; empty without one."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of another run; one of a run without a scaler leaves it as it is.

        Args:
            state: What `state_dict` returned.
        """
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)
