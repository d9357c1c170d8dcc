"""How a perturbation is searched for: all choices, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from adadagrad.apps.universal_perturbation.objective import LOSSES
from adadagrad.apps.universal_perturbation.perturbation import check_eps, described, inside_ball
from adadagrad.core.checks import check_below_one, check_choice, check_integer, check_positive
from adadagrad.core.errors import InvalidArgument

METHODS = ("sga", "spgd", "aggregation", "random")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class SearchSettings:
    """The arguments of `find_universal_perturbation`, which says what they mean.

    Args:
        eps: Radius.
        method: One of `METHODS`.
        step: Length of a step, or None.
        k: Draws of each image, on average.
        small_batch: Images of a draw.
        large_batch: Images of an outer step.
        epochs: Passes over the data.
        loss: One of `LOSSES`.
        beta: Bound of the cross-entropy.
        momentum: Weight of the past.
        target: Class, or None.
        init: Start, or None.
        seed: Of the draws.

    Raises:
        InvalidArgument: One is out of its range, or they contradict each other.
    """

    eps: float
    method: str
    step: float | None
    k: int
    small_batch: int
    large_batch: int
    epochs: int
    loss: str
    beta: float
    momentum: float
    target: int | None
    init: Tensor | None
    seed: int

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_choice("method", self.method, METHODS)
        check_choice("loss", self.loss, LOSSES)
        if self.step is not None:
            check_positive(step=self.step)
        check_integer(1, k=self.k, small_batch=self.small_batch, large_batch=self.large_batch, epochs=self.epochs)
        if self.draws_small and self.small_batch > self.large_batch:
            raise InvalidArgument(
                f"small_batch must be <= large_batch, from which it is drawn, got {self.small_batch} and "
                f"{self.large_batch}: lower small_batch or raise large_batch"
            )
        check_positive(beta=self.beta)
        check_below_one(momentum=self.momentum)
        check_integer(-(2**63), seed=self.seed)
        if self.target is not None:
            check_integer(0, target=self.target)

    @property
    def draws_small(self) -> bool:
        """Whether small batches are drawn."""
        return self.method in ("sga", "aggregation")

    @property
    def length(self) -> float:
        """Length of a step [image units]."""
        return 0.1 * self.eps if self.step is None else self.step

    def draws(self, images: int) -> int:
        """Return M, how many small batches are drawn from so many images: at least one.

        Args:
            images: n.
        """
        return max(1, self.k * images // self.small_batch)

    def start(self, image: Tensor) -> Tensor:
        """Return the first delta, in the shape, dtype and place of an image.

        Args:
            image: (C, H, W).

        Returns:
            `init`, or zeros.

        Raises:
            InvalidArgument: `init` has another shape, or lies outside the ball.
        """
        if self.init is None:
            return torch.zeros_like(image)
        init: object = self.init
        if not isinstance(init, Tensor) or init.shape != image.shape or not init.is_floating_point():
            raise InvalidArgument(
                f"init must be a floating-point tensor of shape {tuple(image.shape)}, got {described(init)}"
            )
        return inside_ball(init.detach(), self.eps, "init").to(image)

    def used(self, images: int) -> dict[str, Any]:
        """Return those that matter for the method, and how many crafting images there were, as plain values.

        Args:
            images: How many.
        """
        names = ["large_batch", "loss", "momentum"]
        names += ["k", "small_batch"] if self.draws_small else []
        names += ["beta"] if self.loss == "clamped_ce" and self.target is None else []
        start = "zeros" if self.init is None else "given"
        return {"images": images, "step": self.length, "init": start} | {name: getattr(self, name) for name in names}
