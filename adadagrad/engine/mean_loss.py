"""How the losses of a step's micro-batches make one mean over its examples, or over their weights.

The total weight is known only when the last micro-batch has come, so each backward runs under the provisional scale
1 / planned size, and the gradient is multiplied once by `MeanLoss.correction` before anything looks at it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adadagrad.core.errors import InvalidArgument, LossWithoutGradient, StepError


class MeanLoss:
    """Takes in one micro-batch after the other.

    Args:
        planned: Examples of the whole step.
    """

    def __init__(self, planned: int) -> None:
        self._planned = planned
        self._losses: list[tuple[Tensor, float]] = []
        self._weights = 0.0
        self._weight_squares = 0.0
        self._weighted: bool | None = None
        self._coefficients: float | Tensor = 1.0

    def add(self, loss: Tensor, rows: int, weight: float | Tensor | None) -> Tensor:
        """Take in a micro-batch, and return what is to be differentiated.

        Args:
            loss: The mean loss over its examples; with `weight`, the sum of weighted losses.
            rows: Its examples.
            weight: Its total weight, or one weight per example (rows,), or None.

        Returns:
            Its share of the step's loss, under the provisional scale.

        Raises:
            StepError: Only some of the step's losses have weights.
            InvalidArgument: The weights have the wrong shape or are not positive.
        """
        if self._weighted is None:
            self._weighted = weight is not None
        elif self._weighted != (weight is not None):
            raise StepError("either every micro-batch of a step has a weight or none has")
        if weight is None:
            factor = rows / self._planned
            self._coefficients = 1 / self._planned
            self._losses.append((loss.detach(), factor))
            return loss if factor == 1.0 else loss * factor
        self._coefficients = self._weigh(weight, rows) / self._planned
        self._losses.append((loss.detach(), 1 / self._planned))
        return loss / self._planned

    def coefficients(self) -> float | Tensor:
        """Return c_i of the micro-batch taken in last: one number, or float64 (rows,)."""
        return self._coefficients

    def refuse_weightless(self) -> None:
        """Refuse a step of which nothing counts.

        Raises:
            InvalidArgument: Its weights add up to 0.
        """
        if self._weighted and self._weights == 0:
            raise InvalidArgument(
                "weight is 0 for every example of the step, so its mean loss does not exist: leave such examples out "
                "of the data set, or raise global_batch_size"
            )

    @property
    def value(self) -> float:
        """Mean loss over the examples (or weights) so far; waits for the device."""
        total = 0.0
        for loss, factor in self._losses:
            total += loss.item() * factor
        return total * self.correction

    @property
    def weight_sq_sum(self) -> float | None:
        """Sum of the squared weights with which examples enter the gradient; None for equal weights."""
        return self._weight_squares / self._weights**2 if self._weighted else None

    @property
    def correction(self) -> float:
        """Factor from the provisional scale to the mean over the weights; 1 without weights."""
        return self._planned / self._weights if self._weighted else 1.0

    def _weigh(self, weight: float | Tensor, rows: int) -> Tensor:
        """Take in a micro-batch's weight; return it per example, float64 (rows,)."""
        weights = torch.as_tensor(weight, dtype=torch.float64).detach()
        if weights.numel() == 1:
            weights = weights.reshape(1).expand(rows) / rows
        if weights.shape != (rows,):
            raise InvalidArgument(f"weight must be a number or have shape ({rows},), got shape {tuple(weights.shape)}")
        if bool((weights < 0).any()) or not bool(weights.isfinite().all()):
            raise InvalidArgument("weight must not be negative or infinite for any example")
        self._weights += float(weights.sum())
        self._weight_squares += float(weights.square().sum())
        return weights


def check_loss(loss: object) -> None:
    """Refuse what cannot be differentiated.

    Args:
        loss: What the user's function returned.

    Raises:
        LossWithoutGradient: It does not require grad.
        InvalidArgument: It is no tensor, or no scalar.
    """
    if not isinstance(loss, Tensor):
        raise InvalidArgument(f"loss must be a tensor, got {type(loss).__name__}: return what the criterion returns")
    if loss.numel() != 1:
        raise InvalidArgument(
            f"loss must be a scalar, got shape {tuple(loss.shape)}: use the mean over the micro-batch, or "
            "(loss.sum(), weight)"
        )
    if not loss.requires_grad:
        raise LossWithoutGradient(
            "loss does not require grad, so no parameter would be trained: compute it from the model's output, "
            "with trainable parameters and without torch.no_grad() or detach()"
        )
