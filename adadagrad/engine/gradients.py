"""The gradient between backward and optimizer: correct its scale once, see that it is finite, clip, clear."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument, LeftoverGradients
from adadagrad.core.optimizing import Extrapolating, TakesGradients
from adadagrad.core.shards import local_part
from adadagrad.core.vectors import HALVES, quick_norm, squared_norm


class Gradients:
    """All gradients that the optimizer will see.

    Args:
        model: The model.
        optimizer: Its optimizer.

    Raises:
        InvalidArgument: A trainable parameter is in no parameter group, or a group holds a parameter that is
            not the model's, so that measured and trained gradient would differ; or nothing is trainable.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names = {p: name for name, p in model.named_parameters()}
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = sum(p not in names for p in trained)
        if foreign:
            raise InvalidArgument(
                f"optimizer holds {foreign} parameters that are not the model's, so their gradients could not be "
                "measured: put all modules that are trained into one model"
            )
        missing = [name for p, name in names.items() if p.requires_grad and p not in set(trained)]
        if missing:
            raise InvalidArgument(
                f"optimizer does not train {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}, though they "
                "require grad: add them to a parameter group, or freeze them with requires_grad_(False)"
            )
        if not any(p.requires_grad for p in names):
            raise InvalidArgument(
                "model has no parameter that requires grad, so there is nothing to train: call requires_grad_(True) on "
                "what should learn"
            )
        self._names, self._parameters, self._optimizer = names, list(names), optimizer

    def refuse_leftovers(self) -> None:
        """Refuse to start a step over gradients that are already there.

        Raises:
            LeftoverGradients: A `.grad` is not None.
        """
        for p in self._parameters:
            if p.grad is not None:
                raise LeftoverGradients(
                    f"{self._names[p]}.grad holds a gradient from outside the step, which would be added to the "
                    "batch's: call optimizer.zero_grad() before the next step"
                )
        if isinstance(self._optimizer, TakesGradients) and self._optimizer.gradients():
            raise LeftoverGradients(
                f"{type(self._optimizer).__name__} holds a gradient from outside the step, which would be added to the "
                "batch's: call optimizer.zero_grad() before the next step"
            )

    def present(self) -> list[Tensor]:
        """Return the gradients that are there."""
        there = [p.grad for p in self._parameters if p.grad is not None]
        return there + self._optimizer.gradients() if isinstance(self._optimizer, TakesGradients) else there

    def scale(self, factor: float) -> None:
        """Multiply every gradient by a factor; by 1 does nothing at all.

        Args:
            factor: Any number.
        """
        if factor == 1.0:
            return
        gradients = [local_part(gradient) for gradient in self.present()]
        coarse = [gradient for gradient in gradients if gradient.dtype in HALVES and gradient.device.type == "cpu"]
        for gradient in coarse:  # a foreach multiplication would round the factor to their kind first
            gradient.mul_(factor)
        fine = [gradient for gradient in gradients if gradient.dtype not in HALVES or gradient.device.type != "cpu"]
        if fine:
            torch._foreach_mul_(fine, factor)

    def correct(self, factor: float) -> None:
        """Multiply every gradient by a factor, and what the optimizer has kept of it during the backward.

        Args:
            factor: Any number; 1 does nothing at all.
        """
        self.scale(factor)
        if factor != 1.0 and isinstance(self._optimizer, Extrapolating):
            self._optimizer.scale_local_(factor)

    def norm(self) -> float:
        """Return the norm of the whole gradient; NaN or infinite if any element is.

        In its own precision, and in float64 where that overflows: a float16 gradient whose norm exceeds 65504 is
        finite all the same, and its step must not be left out.
        """
        norm = quick_norm(self.present())
        return norm if math.isfinite(norm) else math.sqrt(float(squared_norm(self.present())))

    def clip(self, norm: float, max_norm: float) -> None:
        """Shorten the gradient to `max_norm` if it is longer.

        Args:
            norm: Its present norm.
            max_norm: The longest allowed.
        """
        if norm > max_norm:
            self.scale(max_norm / norm)

    def clear(self) -> None:
        """Set every gradient to None."""
        for p in self._parameters:
            p.grad = None
        if isinstance(self._optimizer, TakesGradients):
            self._optimizer.zero_grad()
