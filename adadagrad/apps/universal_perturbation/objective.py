r"""What a perturbation is to raise, and its gradient with respect to the perturbation.

.. math:: L(\delta) = \frac{1}{n} \sum_i \min(CE(f(x_i + \delta), \hat y_i), \beta)
          \quad\text{or}\quad -\frac{1}{n} \sum_i f(x_i + \delta)_{\hat y_i}

:math:`\hat y_i` is the model's own prediction for the clean image: no ground truth enters. The bound beta keeps images
that are fooled already from ruling the gradient. With a target class t the loss is :math:`-CE(\cdot, t)` or
:math:`+f_t`, which is bounded above anyway, so that beta is not used.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from adadagrad.apps.universal_perturbation.perturbation import add
from adadagrad.apps.universal_perturbation.subject import Subject
from adadagrad.core.errors import LossWithoutGradient

LOSSES = ("clamped_ce", "neg_logit")


@final
class Objective:
    """The loss of a perturbation on a batch, raised by the search, and the count of its gradients.

    Args:
        subject: The model under test.
        loss: ``"clamped_ce"`` or ``"neg_logit"``.
        beta: Bound of each image's cross-entropy [nats]; smaller silences images earlier once they are fooled.
        target: The class that predictions are to become; None where they are only to change.
    """

    def __init__(self, subject: Subject, loss: str, beta: float, target: int | None) -> None:
        self.subject = subject
        self.loss = loss
        self.beta = beta
        self.target = target
        self.gradient_count = 0
        """Gradients of single images evaluated so far."""
        self.total = torch.zeros(())
        """Sum of all losses of `gradient` so far, each times its number of images."""

    def classes(self, images: Tensor) -> Tensor:
        """Return the class that each image is to leave, or the target.

        Args:
            images: (n, C, H, W), placed and clean.

        Returns:
            (n,) of int64.
        """
        if self.target is not None:
            return torch.full((len(images),), self.target, device=images.device)
        return self.subject.predictions(images)[0]

    def gradient(self, delta: Tensor, images: Tensor, classes: Tensor) -> Tensor:
        """Return the gradient of the mean loss with respect to the perturbation.

        Args:
            delta: (C, H, W).
            images: (n, C, H, W), placed and clean.
            classes: (n,), what `classes` returned for them.

        Returns:
            (C, H, W).

        Raises:
            LossWithoutGradient: The model's output does not depend on its input for autograd.
        """
        with torch.enable_grad():
            variable = delta.clone().requires_grad_()
            loss = self._value(self.subject.logits(add(images, variable)), classes)
            gradient = torch.autograd.grad(loss, variable, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is None:
            raise LossWithoutGradient(
                "the model's logits do not depend on the images for autograd: remove torch.no_grad(), detach() or "
                "rounding from its forward"
            )
        self.gradient_count += len(images)
        self.total = self.total.to(loss.device) + loss.detach() * len(images)
        return gradient

    def _value(self, logits: Tensor, classes: Tensor) -> Tensor:
        if self.loss == "neg_logit":
            chosen = logits.gather(1, classes.unsqueeze(1)).mean()
            return -chosen if self.target is None else chosen
        entropies = F.cross_entropy(logits, classes, reduction="none")
        return entropies.clamp(max=self.beta).mean() if self.target is None else -entropies.mean()
