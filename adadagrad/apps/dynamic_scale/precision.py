"""Average precision of a detector, of objects of all sizes or of some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adadagrad.apps.dynamic_scale.targets import box_areas
from adadagrad.core.errors import InvalidArgument


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return how much boxes share: the area of the intersection over that of the union.

    Args:
        first: (n, 4) as (x1, y1, x2, y2).
        second: (m, 4).

    Returns:
        (n, m), 0 to 1.
    """
    corner = torch.maximum(first[:, None, :2], second[None, :, :2])
    sides = (torch.minimum(first[:, None, 2:], second[None, :, 2:]) - corner).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    union = box_areas(first)[:, None] + box_areas(second)[None] - shared
    return shared / union.clamp(min=1e-12)


def average_precision(
    detections: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Any]],
    *,
    iou: float = 0.5,
    areas: tuple[float, float] = (0.0, math.inf),
) -> float:
    r"""Return the average precision for objects whose area lies in a range.

    .. math:: \mathrm{AP} = \int_0^1 \max_{r' \ge r} p(r') \, dr

    p(r) is the share of right ones among the surest detections that reach recall r. In each image detections take, the
    surest first, the free object in range with which they share most, if that is at least `iou`. One that shares so
    much with an object out of range, or that has taken none and is itself out of range, does not count at all, as in
    COCO. One class.

    Args:
        detections: For each image ``boxes`` (n, 4) and ``scores`` (n,).
        targets: For each image ``boxes`` (m, 4).
        iou: What a detection and an object must share, 0 to 1.
        areas: Smallest area, and the one from which on objects are out of range [pixels^2].

    Returns:
        0 to 1; NaN where no object is in range.

    Raises:
        InvalidArgument: Detections and targets are not as many.

    Source: the rules of COCO's evaluation, from memory; the integral is exact instead of a mean over 101 recalls.

    Example:
        >>> target = {"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0], [20.0, 20.0, 28.0, 28.0]])}
        >>> found = {"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]]), "scores": torch.tensor([0.9])}
        >>> average_precision([found], [target])
        0.5
    """
    if len(detections) != len(targets):
        raise InvalidArgument(f"detections and targets must be as many, got {len(detections)} and {len(targets)}")
    objects, hits = 0, []
    for found, target in zip(detections, targets, strict=True):
        truth = target["boxes"]
        inside = _within(box_areas(truth), areas)
        objects += int(inside.sum())
        hits += _judged(found, truth, inside, iou, areas)
    if objects == 0:
        return math.nan
    hits.sort(key=lambda hit: -hit[0])
    right, precision = 0, []
    for number, (_, correct) in enumerate(hits, 1):
        right += correct
        precision.append(right / number)
    total, best = 0.0, 0.0
    for (_, correct), value in zip(reversed(hits), reversed(precision), strict=True):
        best = max(best, value)
        total += best * correct
    return total / objects


def _within(area: Tensor, areas: tuple[float, float]) -> Tensor:
    return (area >= areas[0]) & (area < areas[1])


def _judged(
    found: Mapping[str, Tensor], truth: Tensor, inside: Tensor, iou: float, areas: tuple[float, float]
) -> list[tuple[float, bool]]:
    """Return score and correctness of each detection of an image that counts."""
    order = found["scores"].argsort(descending=True, stable=True)
    boxes, scores = found["boxes"][order], found["scores"][order].tolist()
    shared = pairwise_iou(boxes, truth)
    counted = _within(box_areas(boxes), areas).tolist()
    free, judged = inside.clone(), []
    for number, score in enumerate(scores):
        overlap = shared[number]
        own = torch.where(free, overlap, -1.0)
        if len(own) and float(own.max()) >= iou:
            free[int(own.argmax())] = False
            judged.append((score, True))
        elif counted[number] and not bool((overlap[~inside] >= iou).any()):
            judged.append((score, False))
    return judged
