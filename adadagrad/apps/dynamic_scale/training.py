"""A detector's training loop with feedback: the loss of each positive goes back to the batcher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adadagrad.apps.dynamic_scale.batcher import ScaleBatcher
from adadagrad.apps.dynamic_scale.detector import GridDetector
from adadagrad.apps.dynamic_scale.precision import average_precision
from adadagrad.apps.dynamic_scale.scenes import SMALL_AREA, DigitScenes
from adadagrad.apps.dynamic_scale.targets import Target
from adadagrad.core.checks import check_integer, check_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleStep:
    """What happened in one training step.

    Args:
        step: Number of the step, from 1.
        loss: Of the batch.
        share: Share of box loss from small objects in this step alone; None without positives.
        stitched: Whether the batch was stitched.
        stitched_fraction: Of all batches so far.
        images_read: So far.
    """

    step: int
    loss: float
    share: float | None
    stitched: bool
    stitched_fraction: float
    images_read: int


def train_detector(
    detector: GridDetector, batcher: ScaleBatcher, steps: int, *, lr: float = 2e-3, small_area: float = SMALL_AREA
) -> Iterator[ScaleStep]:
    """Train step by step, with Adam and a learning rate that falls as a cosine to nothing.

    Args:
        detector: Trained in place.
        batcher: Whose `collate` is `stack_images`; its feedback, if any, is updated after every step.
        steps: How many, >= 1.
        lr: Learning rate at the start, > 0.
        small_area: Below which an object is small in what is reported [pixels^2].

    Yields:
        A record a step.
    """
    check_integer(1, steps=steps)
    check_positive(lr=lr)
    optimizer = torch.optim.Adam(detector.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for number in range(1, steps + 1):
        images, targets = next(batcher)
        losses = detector.losses(images, targets)
        optimizer.zero_grad()
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if batcher.feedback is not None:
            batcher.feedback.update(losses.boxes, losses.areas)
        whole = float(losses.boxes.detach().sum())
        small = float(losses.boxes.detach()[losses.areas < small_area].sum())
        yield ScaleStep(
            step=number,
            loss=float(losses.total.detach()),
            share=small / whole if whole > 0 else None,
            stitched=batcher.stitched,
            stitched_fraction=batcher.stitched_fraction,
            images_read=batcher.images_read,
        )


def stack_images(images: list[Tensor], targets: list[Target]) -> tuple[Tensor, list[Target]]:
    """Collate images of one size.

    Args:
        images: Each (C, H, W).
        targets: One an image.

    Returns:
        (B, C, H, W), and the targets.
    """
    return torch.stack(list(images)), targets


def evaluate_detector(
    detector: GridDetector, scenes: DigitScenes, *, small_area: float = SMALL_AREA, chunk: int = 100
) -> tuple[float, float]:
    """Return the average precision at IoU 0.5 for small and for large objects.

    Args:
        detector: Set to evaluation, and back to what it was.
        scenes: To look at.
        small_area: Where small ends [pixels^2].
        chunk: Scenes at once, >= 1; changes the time only.

    Returns:
        AP small and AP large, 0 to 1.
    """
    training = detector.training
    detector.eval()
    found, targets = [], []
    for first in range(0, len(scenes), chunk):
        some = [scenes[number] for number in range(first, min(first + chunk, len(scenes)))]
        found += detector.detect(torch.stack([image for image, _ in some]))
        targets += [target for _, target in some]
    detector.train(training)
    return (
        average_precision(found, targets, areas=(0.0, small_area)),
        average_precision(found, targets, areas=(small_area, math.inf)),
    )
