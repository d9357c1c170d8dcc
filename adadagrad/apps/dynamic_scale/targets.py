"""Targets of detection as torchvision has them: what is asked of them, and how they move with their image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adadagrad.core.errors import InvalidArgument

Target = dict[str, Any]
KNOWN = ("boxes", "labels", "area", "iscrowd", "masks", "image_id")
PER_BOX = ("boxes", "labels", "area", "iscrowd", "masks")


def box_areas(boxes: Tensor) -> Tensor:
    """Return the areas of boxes.

    Args:
        boxes: (n, 4) as (x1, y1, x2, y2).

    Returns:
        (n,) width times height, in squared units of the boxes; 0 for a box turned inside out.
    """
    return (boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Return boxes given as COCO does, (x, y, width, height), as (x1, y1, x2, y2).

    Args:
        boxes: (n, 4), or an empty tensor of any shape.

    Returns:
        (n, 4), a new tensor.

    Example:
        >>> xywh_to_xyxy(torch.tensor([[8.0, 8.0, 16.0, 4.0]]))
        tensor([[ 8.,  8., 24., 12.]])
    """
    boxes = boxes.reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def check_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    """Require dicts with finite boxes of shape (n, 4), and n of whatever else is given an object.

    Args:
        targets: One an image.

    Raises:
        InvalidArgument: One of them is not so; the message says which.
    """
    for number, target in enumerate(targets):
        if not isinstance(target, Mapping) or not isinstance(target.get("boxes"), Tensor):
            raise InvalidArgument(
                f"targets[{number}] must be a dict with a tensor 'boxes', got {type(target).__name__}"
            )
        boxes = target["boxes"]
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise InvalidArgument(
                f"targets[{number}]['boxes'] must have shape (n, 4), got {tuple(boxes.shape)}: an image without "
                "objects has torch.zeros(0, 4)"
            )
        if not boxes.is_floating_point():
            raise InvalidArgument(f"targets[{number}]['boxes'] must be floating point, got {boxes.dtype}: add .float()")
        if not bool(boxes.isfinite().all()):
            raise InvalidArgument(f"targets[{number}]['boxes'] must be finite, got NaN or infinity")
        for name in PER_BOX[1:]:
            if name in target and len(target[name]) != len(boxes):
                raise InvalidArgument(
                    f"targets[{number}][{name!r}] must hold one entry a box, got {len(target[name])} for "
                    f"{len(boxes)} boxes"
                )


def check_images(images: Sequence[Tensor], targets: Sequence[Mapping[str, Any]], group: int) -> None:
    """Require images that can stand in one batch, a target for each, and whole groups of them.

    Args:
        images: Each (C, H, W).
        targets: One an image.
        group: How many go together, such as 4.

    Raises:
        InvalidArgument: They are not so, or a target has a key that would not move with its image.
    """
    if len(images) != len(targets):
        raise InvalidArgument(f"images and targets must be as many, got {len(images)} and {len(targets)}")
    if not images or len(images) % group:
        raise InvalidArgument(f"images must be a positive multiple of {group}, got {len(images)}: draw whole groups")
    for number, image in enumerate(images):
        if not isinstance(image, Tensor) or image.dim() != 3 or 0 in image.shape:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise InvalidArgument(f"images[{number}] must be a tensor (C, H, W), got {got}")
        if image.shape[0] != images[0].shape[0] or image.dtype != images[0].dtype:
            raise InvalidArgument(
                f"images[{number}] must have the channels and dtype of the first, {images[0].shape[0]} and "
                f"{images[0].dtype}, got {image.shape[0]} and {image.dtype}"
            )
    check_targets(targets)
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        if target.keys() != targets[0].keys():
            raise InvalidArgument(
                f"targets[{number}] must have the keys of the first, {sorted(targets[0])}, got {sorted(target)}"
            )
        for name in target:
            if name not in KNOWN:
                raise InvalidArgument(
                    f"targets[{number}] holds {name!r}, which would not move with its image: remove it, or give a "
                    f"stitch function of your own; known: {', '.join(KNOWN)}"
                )
        if "labels" not in target:
            raise InvalidArgument(f"targets[{number}] must hold 'labels'")
        if "masks" in target and target["masks"].shape[1:] != image.shape[1:]:
            raise InvalidArgument(
                f"targets[{number}]['masks'] must have the image's size {tuple(image.shape[1:])}, got "
                f"{tuple(target['masks'].shape[1:])}"
            )


def resized(target: Mapping[str, Any], old: tuple[int, int], new: tuple[int, int], min_size: float) -> Target:
    """Return a target for its image at another size.

    Boxes are cut at the image's border; those with a side of 0, or below `min_size` afterwards, are dropped with all
    that belongs to them.

    Args:
        target: Of a checked image; it is not changed.
        old: (H, W) of the image.
        new: (H, W) to be.
        min_size: Smallest side of a box that is kept [pixels of the new image].

    Returns:
        Boxes, areas and masks scaled; the rest as it was.
    """
    (height, width), (tall, wide) = old, new
    boxes = target["boxes"]
    limit = boxes.new_tensor([width, height, width, height])
    boxes = boxes.clamp(min=0).minimum(limit) * boxes.new_tensor([wide / width, tall / height] * 2)
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = ((sides > 0) & (sides >= min_size)).all(1)
    result = {name: value[keep] if name in PER_BOX else value for name, value in target.items()}
    result["boxes"] = boxes[keep]
    if "area" in result:
        result["area"] = scaled_area(result["area"], wide / width * (tall / height))
    if "masks" in result:
        masks = result["masks"]
        small = F.interpolate(masks[None].to(torch.uint8), size=new, mode="nearest")[0] if len(masks) else None
        result["masks"] = masks.new_zeros((0, *new)) if small is None else small.to(masks.dtype)
    return result


def scaled_area(area: Tensor, factor: float) -> Tensor:
    """Return areas times a factor, as floating point: an annotation's area need not be that of its box.

    Args:
        area: (n,).
        factor: Of the scales in both directions.
    """
    return (area if area.is_floating_point() else area.float()) * factor
