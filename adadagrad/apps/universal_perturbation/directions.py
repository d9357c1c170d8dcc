r"""From a large batch to a direction: one gradient, or many small-batch gradients along a walk that are averaged.

.. math:: g_m = \nabla L_{S_m}(\delta'_{m-1}), \quad \delta'_m = \mathrm{clip}(\delta'_{m-1} + a\,\mathrm{sign}\,g_m,
          -\varepsilon, \varepsilon), \quad \bar g = \frac{1}{M} \sum_m g_m, \quad
          V \leftarrow \mu V + \frac{\bar g}{\|\bar g\|_1}

The step is the sign of :math:`\bar g`, or of V with momentum; the walk's end is thrown away.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from adadagrad.apps.universal_perturbation.objective import Objective
from adadagrad.core.errors import NonFiniteGradient


def single(objective: Objective, delta: Tensor, images: Tensor) -> Tensor:
    """Return the gradient at delta over the whole batch, as SPGD uses it.

    Args:
        objective: What is raised.
        delta: (C, H, W).
        images: (n, C, H, W), placed and clean.

    Returns:
        (C, H, W).
    """
    return objective.gradient(delta, images, objective.classes(images))


def aggregated(
    objective: Objective,
    delta: Tensor,
    images: Tensor,
    *,
    draws: int,
    small_batch: int,
    step: float,
    bound: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Return the mean of small-batch gradients along a walk that starts at delta, as SGA uses it.

    Each small batch is drawn from the large one without replacement and independently of the others: an image may be
    in several of them, or in none.

    Args:
        objective: What is raised.
        delta: (C, H, W).
        images: (n, C, H, W), placed and clean.
        draws: M, how many small batches.
        small_batch: Images in each; all n where there are fewer.
        step: a, length of the walk's steps; 0 leaves delta where it is, the ablation without a walk.
        bound: Largest absolute value of an entry.
        generator: On the CPU, so that the draws are the same for every device.

    Returns:
        (C, H, W).
    """
    classes = objective.classes(images)
    total, here = torch.zeros_like(delta), delta
    for _ in range(draws):
        rows = torch.randperm(len(images), generator=generator)[:small_batch].to(images.device)
        gradient = objective.gradient(here, images[rows], classes[rows])
        total += gradient
        here = moved(here, gradient, step, bound)
    return total / draws


def moved(delta: Tensor, direction: Tensor, step: float, bound: Tensor) -> Tensor:
    """Return clip(delta + step sign(direction), -bound, bound).

    Args:
        delta: (C, H, W).
        direction: (C, H, W); only its signs count.
        step: Length of the step in every entry.
        bound: Largest absolute value of an entry.
    """
    return torch.clamp(delta + step * direction.sign(), -bound, bound)


@final
class Momentum:
    """Directions so far, each divided by its L1 norm and weighted by powers of `weight`.

    The norm makes it independent of the scale of the loss. A direction of zeros adds nothing.

    Args:
        weight: Of the past, >= 0 and below 1; 0 is no momentum, and the signs are those of the last direction.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.velocity: Tensor | None = None

    def add(self, direction: Tensor) -> Tensor:
        """Add a direction.

        Args:
            direction: (C, H, W).

        Returns:
            The sum, whose signs are the next step.

        Raises:
            NonFiniteGradient: The direction holds NaN or an infinite value.
        """
        norm = float(direction.abs().sum())
        if not norm < float("inf"):
            raise NonFiniteGradient(
                "the gradient with respect to the perturbation is not finite: check the model's weights, and its "
                "logits for images at the edge of [0, 1]"
            )
        if norm > 0:
            direction = direction / norm
        old = self.velocity
        self.velocity = direction if old is None else self.weight * old + direction
        return self.velocity
