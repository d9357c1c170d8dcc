"""Many images shrunk into a batch of the same number of pixels: four on a canvas, or k times as many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adadagrad.apps.dynamic_scale.targets import PER_BOX, Target, check_images, resized
from adadagrad.core.checks import check_at_least, check_choice, check_integer
from adadagrad.core.errors import InvalidArgument

MODES = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")


def stitch4(
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Any]],
    mode: str = "nearest",
    *,
    multiple_of: int = 32,
    min_size: float = 0.0,
) -> tuple[list[Tensor], list[Target]]:
    r"""Put each four images, at half size, into the quadrants of a canvas: top left, top right, bottom left and right.

    .. math:: (x, y) \to \left(\frac{W/2}{w} x + x_0, \; \frac{H/2}{h} y + y_0\right)

    In code: (H, W) is the largest height and width among all images given, rounded up to `multiple_of`; every image of
    size (h, w) becomes exactly (H/2, W/2), its aspect ratio is not kept (group images of like shape), and (x_0, y_0) is
    its quadrant's corner. A canvas has the pixels of one image, so activations need no more memory; but four images
    were read for it, and it holds about four times the objects, which matters where a loss is divided by the images.

    Boxes are cut at their image's border, so that none reaches into a neighbour; those without width or height are
    dropped with their labels, areas, flags and masks. ``area`` is scaled with the image, ``image_id`` becomes -1, masks
    go by nearest neighbour, and a thin one may lose all its pixels. Images without objects are allowed.

    Args:
        images: 4n of them, each (C, H, W), one dtype; integers only with a nearest mode.
        targets: One an image, all with the same keys: ``boxes`` (m, 4) as (x1, y1, x2, y2) in pixels, ``labels``, and
            if you have them ``area``, ``iscrowd``, ``masks`` (m, H, W) and ``image_id``. They are not changed.
        mode: How images are shrunk: ``"nearest"`` as in the paper, or one of `MODES`, as in `F.interpolate`.
        multiple_of: The canvas' sides are multiples of it [pixels], an even number >= 2; 2 leaves even sides as they
            are.
        min_size: Drop boxes with a side below this, after shrinking [pixels], >= 0.

    Returns:
        n canvases (C, H, W), and n targets with the objects of the four in order.

    Raises:
        InvalidArgument: An argument is not as described; the message names image or target.

    Source: Chen et al. (2020), arXiv 2004.12432, spatial stitching; geometry verified in the authors' public code.
    Differs from the paper: boxes are cut at the border, `mode` and `min_size` are added.

    Example:
        >>> target = {"boxes": torch.tensor([[8.0, 8.0, 24.0, 24.0]]), "labels": torch.tensor([1])}
        >>> canvases, merged = stitch4([torch.zeros(3, 32, 32)] * 4, [target] * 4)
        >>> canvases[0].shape, merged[0]["boxes"].tolist()[1:3]
        (torch.Size([3, 32, 32]), [[20.0, 4.0, 28.0, 12.0], [4.0, 20.0, 12.0, 28.0]])
    """
    tall, wide = _canvas(images, targets, 4, mode, multiple_of, min_size)
    if multiple_of % 2:
        raise InvalidArgument(f"multiple_of must be even, got {multiple_of}: the canvas is halved")
    half = (tall // 2, wide // 2)
    corners = [(0, 0), (0, half[1]), (half[0], 0), half]
    canvases, merged = [], []
    for first in range(0, len(images), 4):
        canvas = images[first].new_zeros((images[first].shape[0], tall, wide))
        parts = []
        for number, (top, left) in enumerate(corners, first):
            image = images[number]
            canvas[:, top : top + half[0], left : left + half[1]] = _shrunk(image, half, mode)
            part = resized(targets[number], (image.shape[1], image.shape[2]), half, min_size)
            part["boxes"] = part["boxes"] + part["boxes"].new_tensor([left, top, left, top])
            if "masks" in part:
                part["masks"] = F.pad(part["masks"], (left, wide - left - half[1], top, tall - top - half[0]))
            parts.append(part)
        canvases.append(canvas)
        merged.append(_merged(parts))
    return canvases, merged


def batch_stitch(
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Any]],
    k: int = 4,
    mode: str = "nearest",
    *,
    multiple_of: int = 32,
    min_size: float = 0.0,
) -> tuple[Tensor, list[Target]]:
    r"""Shrink k n images to a k-th of the pixels each: the batch grows instead of being pasted together.

    .. math:: (C, h, w) \to (C, H / \sqrt k, W / \sqrt k)

    In code: (H, W) as in `stitch4`, sides are rounded to the nearest pixel. For any k, not just 4. Divide what your
    model samples in each image (regions of interest, anchors) by k, so that their number in a batch stays the same. A
    model that resizes its inputs, as torchvision's detectors do, would undo the shrinking: let it take these sizes as
    they are. ``image_id`` stays, as an output is still one image.

    Args:
        images: A multiple of k of them, each (C, H, W), one dtype.
        targets: As in `stitch4`.
        k: How many images share the pixels of one, >= 1. Larger shrinks more.
        mode: As in `stitch4`.
        multiple_of: (H, W) is rounded up to multiples of it before it is divided [pixels], >= 1.
        min_size: As in `stitch4`.

    Returns:
        Shape (k n, C, about H / sqrt(k), about W / sqrt(k)), and a target for each.

    Raises:
        InvalidArgument: An argument is not as described; the message names image or target.

    Source: Chen et al. (2020), arXiv 2004.12432, batch stitching; verified in the authors' public code, whose README
        reports AP 38.3 to 38.7 for k = 2 to 8. Differs from the paper: no.

    Example:
        >>> target = {"boxes": torch.tensor([[8.0, 8.0, 24.0, 24.0]]), "labels": torch.tensor([1])}
        >>> batch, moved = batch_stitch([torch.zeros(3, 64, 64)] * 4, [target] * 4, k=4)
        >>> batch.shape, moved[3]["boxes"].tolist()
        (torch.Size([4, 3, 32, 32]), [[4.0, 4.0, 12.0, 12.0]])
    """
    check_integer(1, k=k)
    tall, wide = _canvas(images, targets, k, mode, multiple_of, min_size)
    size = (max(1, round(tall / math.sqrt(k))), max(1, round(wide / math.sqrt(k))))
    batch = torch.stack([_shrunk(image, size, mode) for image in images])
    moved = [
        resized(target, (image.shape[1], image.shape[2]), size, min_size)
        for image, target in zip(images, targets, strict=True)
    ]
    return batch, moved


def _canvas(
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Any]],
    group: int,
    mode: str,
    multiple_of: int,
    min_size: float,
) -> tuple[int, int]:
    """Check everything, and return the height and width that the largest image needs."""
    check_choice("mode", mode, MODES)
    check_integer(1, multiple_of=multiple_of)
    check_at_least(0, min_size=min_size)
    check_images(images, targets, group)
    if not images[0].is_floating_point() and not mode.startswith("nearest"):
        raise InvalidArgument(f"images must be floating point for mode={mode!r}, got {images[0].dtype}: use 'nearest'")
    tall, wide = (max(image.shape[side] for image in images) for side in (1, 2))
    return -(-tall // multiple_of) * multiple_of, -(-wide // multiple_of) * multiple_of


def _shrunk(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    smooth = mode in ("bilinear", "bicubic")
    return F.interpolate(image[None], size=size, mode=mode, antialias=smooth)[0]


def _merged(parts: Sequence[Target]) -> Target:
    """Join the targets of one canvas."""
    whole: Target = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name in PER_BOX}
    if "image_id" in parts[0]:
        old = parts[0]["image_id"]
        whole["image_id"] = torch.full_like(old, -1) if isinstance(old, Tensor) else -1
    return whole
