"""The inverse use: train a model on batches part of which carry the perturbation found against it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.apps.universal_perturbation.perturbation import Perturbation
from adadagrad.core.checks import check_fraction
from adadagrad.core.errors import InvalidArgument


def adversarial_training_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    perturbation: Perturbation,
    *,
    share: float = 0.5,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """Return the loss of a batch whose first part carries the perturbation.

    Find the perturbation anew for each batch, against the model as it is, in a few steps of SPGD::

        for images, labels in loader:
            perturbation = find_universal_perturbation(
                model.eval(), images, eps, method="spgd", epochs=4, step=eps / 3, large_batch=len(images)
            )
            model.train()
            optimizer.zero_grad()
            adversarial_training_loss(model, images, labels, perturbation).backward()
            optimizer.step()

    One that is found once an epoch, or carried on from batch to batch, is learnt by heart, and the next search finds
    another: on the digits that left the fooling ratio where it was or raised it (pilot, two and three seeds), while
    one for each batch halved it.

    Afterwards search again, with another seed and the full number of epochs, on images of which it was not found, and
    compare the two reports: fooling ratio, clean accuracy, which may suffer, and the random row. Compare with a model
    that was trained for as long without the perturbation, since training on alone changes the numbers too. Cost: a
    gradient of the input for each step of the search beside that of the plain loss, five times the time here.

    Args:
        model: In training mode or not.
        images: (n, C, H, W) in [0, 1], in random order: the first round(share * n) carry the perturbation.
        labels: (n, ...), what `loss` takes.
        perturbation: The present one.
        share: From 0, plain training, to 1, no clean image. Smaller keeps more of the clean accuracy.
        loss: Of the model's output and the labels.

    Returns:
        What `loss` returns, with a graph; the perturbation is a constant in it.

    Raises:
        InvalidArgument: Images are not in [0, 1] or of another shape than the perturbation, or `share` is no fraction.

    Source: one perturbation for a batch: Mummadi, Brox, Metzen (2019), "Defending against universal perturbations with
        shared adversarial training", arXiv 1812.03705; one carried on: Shafahi, Najibi, Xu, Dickerson, Davis,
        Goldstein (2020), "Universal adversarial training", arXiv 1811.11304 (both from memory, unverified (medium)).
    Differs from the paper: the search is a call of its own, any perturbation can be given, and a share of the batch
        stays clean.

    Example:
        >>> perturbation = Perturbation(delta=torch.full((1, 2, 2), 0.1), eps=0.25, method="by hand")
        >>> images, labels = torch.rand(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> adversarial_training_loss(model, images, labels, perturbation).requires_grad
        True
    """
    check_fraction(share=share)
    if not isinstance(perturbation, Perturbation):
        raise InvalidArgument(f"perturbation must be a Perturbation, got a {type(perturbation).__name__}")
    count = round(share * len(images))
    carrying = [perturbation.apply(images[:count])] if count else []
    return loss(model(torch.cat([*carrying, images[count:]])), labels)
