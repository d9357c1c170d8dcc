"""The perturbation as a record, what it does to images, and its random counterpart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from adadagrad.apps.universal_perturbation.images import check_images
from adadagrad.core.checks import check_fraction, check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.mixing import seed_for


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Perturbation:
    """One perturbation for all images, and how it came about.

    Args:
        delta: (C, H, W), finite, no entry larger than `eps` in absolute value [image units]. A copy is kept,
            on the CPU.
        eps: Radius of the ball in the maximum norm, 0 to 1 [image units].
        method: ``"sga"``, ``"spgd"``, ``"aggregation"``, ``"random"``, or a word of your own.
        seed: Of the draws.
        gradient_count: Gradients of single images that were evaluated to find it: its cost.
        epochs: Passes over the crafting images.
        target: The class that predictions were to become; None where they were only to change.
        settings: Step, batch sizes, loss and so on, plain values by name.

    Raises:
        InvalidArgument: `delta` is no image, not finite or outside the ball; a number is out of its range.

    Example:
        >>> perturbation = Perturbation(delta=torch.tensor([[[0.25, -0.25]]]), eps=0.25, method="by hand")
        >>> perturbation.apply(torch.tensor([[[[0.0, 0.0]]], [[[0.5, 1.0]]]])).flatten().tolist()
        [0.25, 0.0, 0.75, 0.75]
    """

    delta: Tensor
    eps: float
    method: str
    seed: int = 0
    gradient_count: int = 0
    epochs: int = 0
    target: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_integer(0, gradient_count=self.gradient_count, epochs=self.epochs)
        check_integer(-(2**63), seed=self.seed)
        if self.target is not None:
            check_integer(0, target=self.target)
        if not isinstance(self.delta, Tensor) or self.delta.dim() != 3 or not self.delta.is_floating_point():
            raise InvalidArgument(f"delta must be a floating-point tensor (C, H, W), got {described(self.delta)}")
        object.__setattr__(self, "delta", inside_ball(self.delta.detach().cpu(), self.eps, "delta"))

    @property
    def linf_norm(self) -> float:
        """The largest entry in absolute value [image units]."""
        return float(self.delta.abs().max()) if self.delta.numel() else 0.0

    def apply(self, images: Tensor) -> Tensor:
        """Return the images with the perturbation added, cut off at 0 and 1.

        Args:
            images: (n, C, H, W), floating point in [0, 1], on any device.

        Returns:
            The same shape, dtype and device; the argument is left alone.

        Raises:
            InvalidArgument: The images are no images, outside [0, 1], or of another shape than the perturbation.
        """
        check_images(images, shape=self.delta.shape)
        return add(images, self.delta.to(images.device)).to(images.dtype)


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class CraftingStep:
    """What a callback sees after each outer step.

    Args:
        step: Its number, from 1.
        steps: How many there will be.
        epoch: The pass over the images that it belongs to, from 1.
        gradient_count: Gradients of single images so far.
        loss: Mean over the gradients of this step of the loss that is being raised.
        delta: (C, H, W), a copy of the perturbation as it is now, on the model's device.
    """

    step: int
    steps: int
    epoch: int
    gradient_count: int
    loss: float
    delta: Tensor


def add(images: Tensor, delta: Tensor) -> Tensor:
    """Return clip(x + delta, 0, 1), in the wider of the two dtypes.

    Args:
        images: (n, C, H, W).
        delta: (C, H, W), on the same device.
    """
    return (images + delta).clamp(0, 1)


def random_sign(shape: torch.Size, eps: float, seed: int) -> Perturbation:
    """Return the baseline of every report: eps times a random sign in every entry.

    Args:
        shape: (C, H, W).
        eps: The radius.
        seed: Of the signs; they are drawn on the CPU.
    """
    generator = torch.Generator().manual_seed(seed_for(seed))
    signs = 2 * torch.randint(0, 2, tuple(shape), generator=generator) - 1
    return Perturbation(delta=signs * inside(eps, torch.float32), eps=eps, method="random", seed=seed)


def inside(eps: float, dtype: torch.dtype) -> Tensor:
    """Return the largest number of a dtype that is not above eps, so that rounding does not leave the ball.

    Args:
        eps: The radius.
        dtype: Of the perturbation.

    Returns:
        A scalar tensor.

    Example:
        >>> float(torch.tensor(0.1)) > 0.1, float(inside(0.1, torch.float32)) <= 0.1
        (True, True)
    """
    bound = torch.tensor(eps, dtype=dtype)
    return bound if float(bound) <= eps else torch.nextafter(bound, torch.zeros_like(bound))


def inside_ball(delta: Tensor, eps: float, name: str) -> Tensor:
    """Return a copy that lies in the ball to the last bit, of a tensor that does so up to the rounding of eps.

    Args:
        delta: Any shape.
        eps: The radius.
        name: What the message calls it.

    Returns:
        The same shape, dtype and device.

    Raises:
        InvalidArgument: An entry is larger, or NaN.
    """
    largest = float(delta.abs().max()) if delta.numel() else 0.0
    if not largest <= max(eps, float(torch.tensor(eps, dtype=delta.dtype))):  # NaN too
        raise InvalidArgument(
            f"{name} must lie within eps = {eps:g} of 0, got a largest entry of {largest:g}: pass "
            f"{name}.clamp(-eps, eps), or a larger eps"
        )
    bound = inside(eps, delta.dtype).to(delta.device)
    return delta.clamp(-bound, bound)


def check_eps(eps: float) -> None:
    """Require a radius from 0 to 1.

    Args:
        eps: The radius.

    Raises:
        InvalidArgument: It is negative, above 1 or no number.
    """
    try:
        check_fraction(eps=eps)
    except InvalidArgument as error:
        raise InvalidArgument(f"{error}: it is in the units of images in [0, 1], such as 8 / 255") from None


def described(value: object) -> str:
    """Return what something is, in few words: shape and dtype of a tensor, the type of anything else.

    Args:
        value: The thing.
    """
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
