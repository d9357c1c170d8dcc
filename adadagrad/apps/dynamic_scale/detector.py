"""A small detector without anchors: each cell of a grid says whether it lies on an object, and where that object is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.apps.dynamic_scale.precision import pairwise_iou
from adadagrad.apps.dynamic_scale.targets import box_areas
from adadagrad.core.checks import check_integer

STRIDE = 4
"""Pixels from one cell to the next."""
SHIFT, SIDE = 8.0, 16.0
"""Units of a box's shift from its cell and of its sides [pixels]."""


@dataclass(frozen=True, slots=True)
class DetectionLosses:
    """What a training step needs.

    Args:
        total: Scalar to go backward from.
        boxes: (n,) L1 loss of each positive cell, summed over four coordinates; with a graph.
        areas: (n,) area of the box that each belongs to [pixels^2 of the image given].
    """

    total: Tensor
    boxes: Tensor
    areas: Tensor


@final
class GridDetector(nn.Module):
    """Find objects of one kind in grey images; a hundred thousand parameters, for experiments on one core.

    A cell is positive where its centre lies in the middle half of a box, or within half a stride of the box's centre;
    of several boxes the smallest counts. It predicts a logit and four numbers: the box's centre relative to its own in
    units of 8 pixels, and the logarithms of the sides in units of 16. Losses: focal loss on all logits, and L1 on the
    four numbers, both divided by the number of positives in the batch. Large objects have more positives, as in the
    detectors that it stands for, and so most of the loss.

    Group normalisation, no batch normalisation: regular and stitched batches do not share statistics.

    Args:
        width: Channels of the trunk, a multiple of 8. 48 makes 102,341 parameters.

    Raises:
        InvalidArgument: width is not an integer >= 8.

    Source: the shape follows Tian et al. (2019), "FCOS", arXiv 1904.01355, much reduced, without its pyramid.

    Example:
        >>> sum(parameter.numel() for parameter in GridDetector().parameters())
        102341
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        check_integer(8, width=width)
        sizes = [(1, 16, 2), (16, 32, 2), (32, width, 1), (width, width, 1), (width, width, 1), (width, width, 1)]
        sizes.append((width, width, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in sizes:
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, 5, 1)
        with torch.no_grad():
            self.head.bias.zero_()  # type: ignore[union-attr]
            self.head.bias[0] = -4.0  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        """Return the raw predictions.

        Args:
            images: (B, 1, H, W), sides that are multiples of 4.

        Returns:
            (B, 5, H / 4, W / 4): logit, shift in x and y, logarithm of width and height.
        """
        predictions: Tensor = self.head(self.trunk(images))
        return predictions

    def losses(self, images: Tensor, targets: Sequence[Mapping[str, Any]]) -> DetectionLosses:
        """Return the loss of a batch, and that of each positive.

        Args:
            images: (B, 1, H, W).
            targets: One an image, with ``boxes`` (m, 4); m may be 0.

        Returns:
            The losses; without any object the total is that of the logits alone.
        """
        predictions = self(images)
        centres = _centres(predictions)  # (cells, 2)
        flat = predictions.flatten(2).transpose(1, 2)  # (B, cells, 5)
        wanted = flat.new_zeros(flat.shape[:2])
        chosen, goals, areas = [], [], []
        for number, target in enumerate(targets):
            boxes = target["boxes"].to(flat)
            if len(boxes) == 0:
                continue
            middle, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
            near = (centres[:, None] - middle).abs() <= (sides / 4).clamp(min=STRIDE / 2)
            area = box_areas(boxes)
            best, owner = torch.where(near.all(2), area, torch.inf).min(1)  # (cells,)
            positive = torch.where(best.isfinite())[0]
            owner = owner[positive]
            wanted[number, positive] = 1
            chosen.append(flat[number, positive, 1:])
            shift = (middle[owner] - centres[positive]) / SHIFT
            goals.append(torch.cat([shift, (sides[owner] / SIDE).log()], dim=1))
            areas.append(area[owner])
        boxes_loss = (torch.cat(chosen) - torch.cat(goals)).abs().sum(1) if chosen else flat.new_zeros(0)
        count = max(1, len(boxes_loss))
        total = (_focal(flat[..., 0], wanted) + boxes_loss.sum()) / count
        return DetectionLosses(total, boxes_loss, torch.cat(areas) if areas else flat.new_zeros(0))

    @torch.no_grad()
    def detect(self, images: Tensor, *, least: float = 0.05, most: int = 50) -> list[dict[str, Tensor]]:
        """Return the objects found, the surest first; of boxes that share more than half only the surest.

        Args:
            images: (B, 1, H, W).
            least: Lowest score of a cell that is looked at, 0 to 1.
            most: How many cells of an image are looked at.

        Returns:
            For each image ``boxes`` (n, 4) and ``scores`` (n,).
        """
        predictions = self(images)
        centres = _centres(predictions)
        found = []
        for flat in predictions.flatten(2).transpose(1, 2):
            scores, order = flat[:, 0].sigmoid().sort(descending=True, stable=True)
            order = order[:most][scores[:most] >= least]
            middle = centres[order] + flat[order, 1:3] * SHIFT
            half = flat[order, 3:].clamp(max=3).exp() * SIDE / 2
            boxes = torch.cat([middle - half, middle + half], dim=1)
            kept = _suppress(boxes)
            found.append({"boxes": boxes[kept], "scores": flat[order, 0].sigmoid()[kept]})
        return found


def _centres(predictions: Tensor) -> Tensor:
    """Return the centres of the cells, (cells, 2) as (x, y) in pixels."""
    rows, columns = predictions.shape[2:]
    x = (torch.arange(columns, device=predictions.device) + 0.5) * STRIDE
    y = (torch.arange(rows, device=predictions.device) + 0.5) * STRIDE
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1).to(predictions.dtype)


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the focal loss, summed, with its usual weights: 0.25 and the square."""
    chance = torch.where(wanted > 0, logits, -logits).sigmoid()
    weight = torch.where(wanted > 0, 0.25, 0.75) * (1 - chance).square()
    return (weight * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")).sum()


def _suppress(boxes: Tensor) -> list[int]:
    """Return which boxes are kept: those that share no more than half with a kept one before them."""
    overlaps = (pairwise_iou(boxes, boxes) > 0.5).tolist()
    kept: list[int] = []
    for number in range(len(boxes)):
        if not any(overlaps[number][other] for other in kept):
            kept.append(number)
    return kept
