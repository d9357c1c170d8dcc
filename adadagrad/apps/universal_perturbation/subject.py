"""The model under test: borrowed, never changed."""

from __future__ import annotations

from itertools import chain
from typing import final

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument


@final
class Subject:
    """A classifier in evaluation mode, and where and in what precision it computes.

    Nothing of it is set: gradients are asked for with respect to the input alone, so parameters keep their
    ``requires_grad`` and ``grad``, and modules their mode, also where an error ends the work.

    Args:
        model: From images (n, C, H, W) in [0, 1] to logits (n, classes); any normalisation is inside it.
        name: What messages call it.

    Raises:
        InvalidArgument: It is no module, or some of it is in training mode.
    """

    def __init__(self, model: nn.Module, name: str = "model") -> None:
        if not isinstance(model, nn.Module):
            raise InvalidArgument(f"{name} must be a torch.nn.Module, got a {type(model).__name__}")
        for path, module in model.named_modules():
            if module.training:
                part = f" in its module {path} ({type(module).__name__})" if path else ""
                raise InvalidArgument(
                    f"{name} must be in evaluation mode, got training mode{part}: call .eval() on it first"
                )
        self.model, self.name = model, name
        tensors = chain(model.parameters(), model.buffers())
        first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
        self.device = None if first is None else first.device
        self._dtype = torch.get_default_dtype() if first is None else first.dtype
        self.dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        """Of images and perturbation before they meet the model: never less than float32."""

    def place(self, images: Tensor) -> Tensor:
        """Return images where the model is, in the precision in which a perturbation is added to them.

        Args:
            images: On any device.
        """
        return images.to(images.device if self.device is None else self.device, self.dtype)

    def logits(self, images: Tensor) -> Tensor:
        """Return the model's output for placed images.

        Args:
            images: (n, C, H, W).

        Returns:
            (n, classes).

        Raises:
            InvalidArgument: The output is something else.
        """
        output = self.model(images.to(self._dtype))
        if not isinstance(output, Tensor):
            raise InvalidArgument(
                f"{self.name} must return logits (n, classes), got a {type(output).__name__}: wrap it in a module that "
                "returns the logits alone"
            )
        if output.dim() != 2 or len(output) != len(images) or output.shape[1] < 2:
            raise InvalidArgument(
                f"{self.name} must return logits (n, classes) with at least two classes, got shape "
                f"{tuple(output.shape)} for {len(images)} images"
            )
        return output.to(self.dtype)

    @torch.no_grad()
    def predictions(self, images: Tensor) -> tuple[Tensor, int]:
        """Return the predicted classes, and how many classes there are.

        Args:
            images: (n, C, H, W), placed.

        Returns:
            (n,) of int64, and the number.
        """
        logits = self.logits(images)
        return logits.argmax(1), logits.shape[1]


def check_target(target: int | None, classes: int) -> None:
    """Require a target to be one of a model's classes.

    Args:
        target: The class, or None.
        classes: How many there are.

    Raises:
        InvalidArgument: It is not.
    """
    if target is not None and target >= classes:
        raise InvalidArgument(f"target must be < {classes}, the number of the model's classes, got {target}")
