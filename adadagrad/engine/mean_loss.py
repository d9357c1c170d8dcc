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
        planned: Examples of the whole step, or those on average of one of the ranks that average their gradients.
        ranks: How many do: `settle` must then be told what they have in all before anything is read.
    """

    def __init__(self, planned: float, ranks: int = 1) -> None:
        self.planned, self.ranks = planned, ranks
        self._loss: float | None = None
        self._losses: list[tuple[Tensor, float]] = []
        self._weights = 0.0
        self._weight_squares = 0.0
        self.weighted: bool | None = None
        """Whether losses come with weights; None before the first one that counts."""
        self._coefficients: float | Tensor = 1.0

    def add(self, loss: Tensor, rows: int, weight: float | Tensor | None) -> Tensor:
        """Take in a micro-batch, and return what is to be differentiated.

        Args:
            loss: The mean loss over its examples; with `weight`, the sum of weighted losses.
            rows: Its examples; 0 for one that is run for the other ranks' sake, and counts nothing.
            weight: Its total weight, or one weight per example (rows,), or None.

        Returns:
            Its share of the step's loss, under the provisional scale.

        Raises:
            StepError: Only some of the step's losses have weights.
            InvalidArgument: The weights have the wrong shape or are not positive.
        """
        if rows == 0:
            self._coefficients = 0.0
            return loss * 0.0
        if self.weighted is None:
            self.weighted = weight is not None
        elif self.weighted != (weight is not None):
            raise StepError("either every micro-batch of a step has a weight or none has")
        if weight is None:
            factor = rows / self.planned
            self._coefficients = 1 / self.planned
            self._losses.append((loss.detach(), factor))
            return loss if factor == 1.0 else loss * factor
        self._coefficients = self._weigh(weight, rows) / self.planned
        self._losses.append((loss.detach(), 1 / self.planned))
        return loss / self.planned

    def coefficients(self) -> float | Tensor:
        """Return c_i of the micro-batch taken in last: one number, or float64 (rows,)."""
        return self._coefficients

    def refuse_weightless(self) -> None:
        """Refuse a step of which nothing counts.

        Raises:
            InvalidArgument: Its weights add up to 0.
        """
        if self.weighted and self._weights == 0:
            raise InvalidArgument(
                "weight is 0 for every example of the step, so its mean loss does not exist: leave such examples out "
                "of the data set, or raise global_batch_size"
            )

    @property
    def value(self) -> float:
        """Mean loss over the examples (or weights) so far; waits for the device."""
        total = self._own_loss if self._loss is None else self._loss
        return total * self.correction

    @property
    def totals(self) -> tuple[float, float, float]:
        """This rank's loss under the provisional scale, its weights and their squares; waits for the device."""
        return self._own_loss, self._weights, self._weight_squares

    def settle(self, loss: float, weights: float, weight_squares: float, *, weighted: bool) -> None:
        """Go over to what all ranks have together.

        Args:
            loss: Sum over ranks of the first of `totals`.
            weights: Of the second.
            weight_squares: Of the third.
            weighted: Whether losses come with weights.
        """
        self._loss, self.weighted = loss / self.ranks, weighted
        self._weights, self._weight_squares = weights / self.ranks, weight_squares / self.ranks**2

    @property
    def weight_sq_sum(self) -> float | None:
        """Sum of the squared weights with which examples enter the gradient; None for equal weights."""
        return self._weight_squares / self._weights**2 if self.weighted else None

    @property
    def correction(self) -> float:
        """Factor from the provisional scale to the mean over the weights; 1 without weights, or where all are 0."""
        return self.planned / self._weights if self.weighted and self._weights else 1.0

    @property
    def _own_loss(self) -> float:
        total = 0.0
        for loss, factor in self._losses:
            total += loss.item() * factor
        return total

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
