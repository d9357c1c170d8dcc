"""Find a universal perturbation by stochastic gradient aggregation, by its baselines, or at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.apps.universal_perturbation.directions import Momentum, aggregated, moved, single
from adadagrad.apps.universal_perturbation.images import ImageSource, check_images
from adadagrad.apps.universal_perturbation.objective import Objective
from adadagrad.apps.universal_perturbation.perturbation import CraftingStep, Perturbation, inside, random_sign
from adadagrad.apps.universal_perturbation.search_settings import SearchSettings
from adadagrad.apps.universal_perturbation.subject import Subject, check_target
from adadagrad.core.mixing import seed_for


def find_universal_perturbation(
    model: nn.Module,
    data: Any,
    eps: float,
    *,
    method: str = "sga",
    step: float | None = None,
    k: int = 4,
    small_batch: int = 10,
    large_batch: int = 250,
    epochs: int = 20,
    loss: str = "clamped_ce",
    beta: float = 9.0,
    momentum: float = 0.9,
    target: int | None = None,
    init: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[CraftingStep], None] | None = None,
) -> Perturbation:
    r"""Find one small perturbation that changes a model's predictions for as many images as possible.

    .. math:: \max_\delta \frac{1}{N} \sum_i L(f(\mathrm{clip}(x_i + \delta, 0, 1)), \hat y_i)
              \quad\text{subject to}\quad \|\delta\|_\infty \le \varepsilon

    In code: f is `model`, :math:`\hat y_i` its own prediction for the clean image (no ground truth is used), epsilon
    `eps`. For each shuffled batch X of n images out of `large_batch`, SGA walks from delta over
    :math:`M = \lfloor K n / n_S \rfloor` batches of n_S images (`small_batch`), each drawn from X independently,
    averages their gradients, and moves delta by `step` times the sign of that mean; the walk's end is thrown away.
    ``"spgd"`` takes one gradient of the whole batch instead, ``"aggregation"`` averages without walking, ``"random"``
    draws eps times random signs and evaluates nothing.

    Use it on models that you own or are authorised to test, and report what `evaluate` says of the result, which
    includes the random row. It is a lower bound: a longer search or another loss may find more. SGA evaluates K times
    the gradients of SPGD in an epoch, so compare at equal `gradient_count` (SPGD with K times the `epochs`), not at
    equal epochs. Time: that many gradients of single images, and a forward for every image of an epoch. Memory: four
    tensors of the size of one image, and the activations of `small_batch` images (SPGD: of `large_batch`).

    The search settles on a class to which it draws the predictions, and which one that is decides more than the method
    does: try several seeds, and SPGD too, and report the largest number. On small networks for digits and MNIST, SGA
    was level with SPGD at equal gradients, or found less (`benchmarks.neighbours.perturbation`).

    The draws depend on the seed alone, not on device or machine; the arithmetic is that of the device. Nothing of the
    model is changed: not its parameters' gradients, not its mode, also where an error ends the search.

    Args:
        model: From images in [0, 1] to logits (n, classes), normalisation inside, in evaluation mode, on any device.
        data: Crafting images: a tensor (n, C, H, W), a data set of images or of tuples that begin with one, or a
            DataLoader of one, of which data set and collate function are used. A hundred images say something
            already; more generalise better.
        eps: Radius in the maximum norm, 0 to 1 [image units]: 10 / 255 is the published setting for ImageNet. Smaller
            changes fewer predictions.
        method: ``"sga"``, ``"spgd"``, ``"aggregation"`` or ``"random"``.
        step: a, > 0 [image units]; None for 0.1 * eps. Smaller needs more epochs.
        k: K, >= 1: how often each image of a batch is drawn on average. Cost grows with it. Not used by spgd.
        small_batch: n_S, >= 1: smaller makes the walk longer and noisier. Not used by spgd.
        large_batch: n_L, >= `small_batch` where that is used: smaller means more, less certain steps in an epoch. No
            more than the data hold.
        epochs: Passes over the data, >= 1. With fewer than eps / step outer steps in all, one for each large batch,
            delta does not reach the edge of the ball, and the fooling ratio says little about `eps`.
        loss: ``"clamped_ce"``, cross-entropy bounded by `beta` for each image, or ``"neg_logit"``, minus the logit.
        beta: The bound, > 0 [nats]: smaller turns earlier from images that are fooled to the others. Not used with
            ``"neg_logit"`` or a `target`.
        momentum: Weight of past directions, >= 0 and below 1; 0 is off. For spgd too.
        target: Class that predictions are to become; None to change them to anything else.
        init: (C, H, W) to start from, within `eps`; None for zeros. Not used by random.
        seed: Of orders and draws.
        progress: Called with a `CraftingStep` after each step.

    Returns:
        The perturbation, with `gradient_count` and the settings.

    Raises:
        InvalidArgument: An argument is out of its range, the model is in training mode or returns no logits, or some
            image is not in [0, 1]; all of that is checked before the first gradient.

    Source: Liu, Zhong, Zhang, Qin, Deng (ICCV 2023), "Enhancing Generalization of Universal Adversarial Perturbation
        through Gradient Aggregation", arXiv 2308.06015; the algorithm, its defaults and both losses are verified in
        liuxuannan/Stochastic-Gradient-Aggregation (b326bea), the paper itself is second-hand. SPGD: Shafahi et al.
        (2020), "Universal adversarial training", arXiv 1811.11304 (from memory, unverified (medium)).
    Differs from the paper: the code is followed where both differ: signs along the walk, the mean of raw gradients
        (the paper's sum has the same sign), a start at zeros. A large batch of 250 is the released script's; notes on
        the paper say 100 (second-hand). The released scripts run with momentum off, and SPGD with the logit loss
        where SGA has the cross-entropy; here both have the same defaults. Short last batches are used: M is at least
        1, and a small batch no larger than the batch. The targeted mode is ours.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
        >>> _ = model[1].weight.data.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
        >>> images = torch.full((30, 1, 2, 2), 0.5) + torch.tensor([0.05, 0.0]).view(2, 1)
        >>> find_universal_perturbation(model, images, 0.25, epochs=11).delta.flatten().tolist()
        [-0.25, -0.25, 0.25, 0.25]
    """
    settings = SearchSettings(
        eps=eps,
        method=method,
        step=step,
        k=k,
        small_batch=small_batch,
        large_batch=large_batch,
        epochs=epochs,
        loss=loss,
        beta=beta,
        momentum=momentum,
        target=target,
        init=init,
        seed=seed,
    )
    with torch.inference_mode(False):  # whose tensors have no gradients
        subject = Subject(model)
        source = ImageSource(data, seed)
        image = subject.place(source.check())
        check_target(target, subject.predictions(image)[1])
        if method == "random":
            return random_sign(image.shape[1:], eps, seed)
        objective = Objective(subject, loss, beta, target)
        delta = _search(settings, objective, source, image[0], progress)
    return Perturbation(
        delta=delta,
        eps=eps,
        method=method,
        seed=seed,
        gradient_count=objective.gradient_count,
        epochs=epochs,
        target=target,
        settings=settings.used(source.size),
    )


def _search(
    settings: SearchSettings,
    objective: Objective,
    source: ImageSource,
    image: Tensor,
    progress: Callable[[CraftingStep], None] | None,
) -> Tensor:
    """Return delta after all epochs."""
    bound = inside(settings.eps, image.dtype).to(image.device)
    delta = settings.start(image).clamp(-bound, bound)
    velocity = Momentum(settings.momentum)
    steps, done = settings.epochs * -(-source.size // settings.large_batch), 0
    for epoch in range(settings.epochs):
        for batch in source.batches(epoch, settings.large_batch):
            check_images(batch, "data", image.shape)
            images = objective.subject.place(batch)
            count, total = objective.gradient_count, objective.total
            if settings.draws_small:
                direction = aggregated(
                    objective,
                    delta,
                    images,
                    draws=settings.draws(len(images)),
                    small_batch=settings.small_batch,
                    step=settings.length if settings.method == "sga" else 0.0,
                    bound=bound,
                    generator=torch.Generator().manual_seed(seed_for(settings.seed, epoch, done)),
                )
            else:
                direction = single(objective, delta, images)
            delta = moved(delta, velocity.add(direction), settings.length, bound)
            done += 1
            if progress is not None:
                now = CraftingStep(
                    step=done,
                    steps=steps,
                    epoch=epoch + 1,
                    gradient_count=objective.gradient_count,
                    loss=float(objective.total - total) / (objective.gradient_count - count),
                    delta=delta.clone(),
                )
                progress(now)
    return delta
