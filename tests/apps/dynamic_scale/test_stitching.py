"""Stitched images and targets: the worked example, a loop over pixels, and everything that is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from adadagrad.apps.dynamic_scale import batch_stitch, stitch4, xywh_to_xyxy
from adadagrad.core.errors import InvalidArgument, UnknownName

Target = dict[str, Any]


def scene(height: int = 32, width: int = 32, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.rand(channels, height, width, generator=torch.Generator().manual_seed(seed))


def target(*boxes: list[float], **more: Any) -> Target:
    found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": found, "labels": torch.arange(1, len(found) + 1), **more}


def pasted(images: list[Tensor], tall: int, wide: int) -> Tensor:
    """The canvas pixel by pixel: nearest neighbour takes the source pixel at floor(position * scale)."""
    canvas = torch.zeros(images[0].shape[0], tall, wide)
    for y in range(tall):
        for x in range(wide):
            image = images[2 * (y >= tall // 2) + (x >= wide // 2)]
            row = (y % (tall // 2)) * image.shape[1] // (tall // 2)
            column = (x % (wide // 2)) * image.shape[2] // (wide // 2)
            canvas[:, y, x] = image[:, row, column]
    return canvas


def test_the_worked_example() -> None:
    targets = [
        target([8.0, 8.0, 24.0, 24.0], labels=torch.tensor([label]), area=torch.tensor([256.0])) for label in range(4)
    ]
    canvases, merged = stitch4([scene(seed=seed) for seed in range(4)], targets)
    assert [canvas.shape for canvas in canvases] == [(3, 32, 32)]
    assert merged[0]["boxes"].tolist() == [[4, 4, 12, 12], [20, 4, 28, 12], [4, 20, 12, 28], [20, 20, 28, 28]]
    assert merged[0]["area"].tolist() == [64.0] * 4
    assert merged[0]["labels"].tolist() == [0, 1, 2, 3]


def test_pixels_are_where_a_loop_puts_them_also_from_images_of_different_sizes() -> None:
    images = [scene(32, 32, 0), scene(40, 21, 1), scene(17, 64, 2), scene(33, 33, 3)]
    canvases, _ = stitch4(images, [target()] * 4)
    assert torch.equal(canvases[0], pasted(images, 64, 64))
    canvases, _ = stitch4(images, [target()] * 4, multiple_of=2)
    assert torch.equal(canvases[0], pasted(images, 40, 64))


def test_boxes_move_with_the_pixels() -> None:
    """A box drawn into the image is found again in the canvas, at the box that the target says."""
    images, targets = [], []
    for number, (height, width) in enumerate([(64, 64), (32, 64), (64, 32), (48, 16)]):
        box = [width // 4, height // 4, width // 2, height // 2]
        image = torch.zeros(1, height, width)
        image[:, box[1] : box[3], box[0] : box[2]] = number + 1
        images.append(image)
        targets.append(target([float(side) for side in box]))
    canvases, merged = stitch4(images, targets)
    for number, box in enumerate(merged[0]["boxes"].long().tolist()):
        rows, columns = torch.where(canvases[0][0] == number + 1)
        found = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        assert found == box


def test_several_groups_share_one_canvas_size() -> None:
    images = [scene(32, 32, seed) for seed in range(4)] + [scene(64, 96, seed) for seed in range(4)]
    targets = [target([0.0, 0.0, 8.0, 8.0], labels=torch.tensor([number])) for number in range(8)]
    canvases, merged = stitch4(images, targets)
    assert [tuple(canvas.shape) for canvas in canvases] == [(3, 64, 96)] * 2
    assert [found["labels"].tolist() for found in merged] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert merged[0]["boxes"][0].tolist() == [0, 0, 12, 8]  # 32 -> 48 wide, 32 -> 32 high


def test_everything_that_belongs_to_an_object_moves_with_it() -> None:
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, 8:24, 8:24], masks[1, 0:8, 16:32] = True, True
    one = target(
        [8.0, 8.0, 24.0, 24.0],
        [16.0, 0.0, 32.0, 8.0],
        area=torch.tensor([200, 128]),  # of the segment, as COCO has it
        iscrowd=torch.tensor([0, 1]),
        masks=masks,
        image_id=torch.tensor([17]),
    )
    before = copy.deepcopy(one)
    _, (whole,) = stitch4([scene()] * 4, [one] * 4)
    assert all(torch.equal(one[name], before[name]) for name in before)
    assert whole["area"].tolist() == [50.0, 32.0] * 4
    assert whole["iscrowd"].tolist() == [0, 1] * 4
    assert whole["labels"].tolist() == [1, 2] * 4
    assert whole["image_id"].tolist() == [-1]
    assert whole["masks"].shape == (8, 32, 32)
    assert whole["masks"].dtype == torch.bool
    for mask, box in zip(whole["masks"], whole["boxes"].long().tolist(), strict=True):
        expected = torch.zeros(32, 32, dtype=torch.bool)
        expected[box[1] : box[3], box[0] : box[2]] = True
        assert torch.equal(mask, expected)


def test_an_image_id_that_is_a_number_becomes_minus_one_and_none_is_invented() -> None:
    _, (whole,) = stitch4([scene()] * 4, [target(image_id=5)] * 4)
    assert whole["image_id"] == -1
    assert sorted(stitch4([scene()] * 4, [target()] * 4)[1][0]) == ["boxes", "labels"]


def test_images_without_objects() -> None:
    empty = target(area=torch.zeros(0), iscrowd=torch.zeros(0), masks=torch.zeros(0, 32, 32, dtype=torch.uint8))
    _, (whole,) = stitch4([scene()] * 4, [empty] * 4)
    assert whole["boxes"].shape == (0, 4)
    assert whole["masks"].shape == (0, 32, 32)
    full = target(
        [0.0, 0.0, 8.0, 8.0], area=torch.ones(1), iscrowd=torch.ones(1), masks=torch.ones(1, 32, 32, dtype=torch.uint8)
    )
    _, (whole,) = stitch4([scene()] * 4, [empty, full, empty, empty])
    assert whole["boxes"].tolist() == [[16, 0, 20, 4]]
    assert whole["masks"].shape == (1, 32, 32)


def test_degenerate_boxes_go_with_all_that_is_theirs_and_others_are_cut_at_the_border() -> None:
    one = target(
        [8.0, 8.0, 8.0, 24.0],  # no width
        [24.0, 24.0, 8.0, 8.0],  # inside out
        [40.0, 0.0, 50.0, 9.0],  # outside
        [-8.0, 16.0, 16.0, 90.0],  # over the border
        masks=torch.ones(4, 32, 32),
        area=torch.ones(4),
    )
    _, (whole,) = stitch4([scene()] * 4, [one] + [target(masks=torch.ones(0, 32, 32), area=torch.ones(0))] * 3)
    assert whole["boxes"].tolist() == [[0, 8, 8, 16]]
    assert whole["labels"].tolist() == [4]
    assert (len(whole["masks"]), len(whole["area"])) == (1, 1)


def test_min_size_is_in_pixels_after_shrinking() -> None:
    one = target([0.0, 0.0, 3.0, 16.0], [0.0, 0.0, 4.0, 4.0])
    assert stitch4([scene()] * 4, [one] * 4, min_size=2.0)[1][0]["labels"].tolist() == [2] * 4
    assert stitch4([scene()] * 4, [one] * 4)[1][0]["labels"].tolist() == [1, 2] * 4
    assert batch_stitch([scene()] * 4, [one] * 4, min_size=2.0)[1][0]["labels"].tolist() == [2]


@pytest.mark.parametrize("mode", ["nearest-exact", "bilinear", "bicubic", "area"])
def test_other_modes_give_other_pixels_and_the_same_boxes(mode: str) -> None:
    images, targets = [scene(seed=seed) for seed in range(4)], [target([1.0, 2.0, 30.0, 31.0])] * 4
    plain, moved = stitch4(images, targets), stitch4(images, targets, mode)
    assert not torch.equal(plain[0][0], moved[0][0])
    assert torch.equal(plain[1][0]["boxes"], moved[1][0]["boxes"])
    assert not torch.equal(batch_stitch(images, targets)[0], batch_stitch(images, targets, mode=mode)[0])
    constant = stitch4([torch.full((3, 32, 32), 0.5)] * 4, targets, mode)[0][0]
    torch.testing.assert_close(constant, torch.full((3, 32, 32), 0.5))


def test_integer_images_stay_integers() -> None:
    images = [(255 * scene(seed=seed)).to(torch.uint8) for seed in range(4)]
    canvases, _ = stitch4(images, [target()] * 4)
    assert canvases[0].dtype == torch.uint8
    assert torch.equal(canvases[0].float(), pasted([image.float() for image in images], 32, 32))
    with pytest.raises(InvalidArgument, match=r"images must be floating point for mode='area', got torch\.uint8"):
        stitch4(images, [target()] * 4, "area")


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_batch_stitch_keeps_the_pixels_up_to_rounding(k: int) -> None:
    images, targets = [scene(64, 96, seed) for seed in range(2 * k)], [target([8.0, 8.0, 72.0, 40.0])] * (2 * k)
    batch, moved = batch_stitch(images, targets, k)
    assert batch.shape[:2] == (2 * k, 3)
    pixels = batch.shape[0] * batch.shape[2] * batch.shape[3]
    assert pixels == pytest.approx(2 * 64 * 96, rel=0.02)
    tall, wide = batch.shape[2:]
    assert (tall, wide) == (round(64 / k**0.5), round(96 / k**0.5))
    for found in moved:
        torch.testing.assert_close(
            found["boxes"], torch.tensor([[8 * wide / 96, 8 * tall / 64, 72 * wide / 96, 40 * tall / 64]])
        )
    if k in (1, 4):
        assert pixels == 2 * 64 * 96


def test_batch_stitch_rounds_the_canvas_up_first_and_keeps_ids() -> None:
    one = target(image_id=3)
    assert batch_stitch([scene(50, 50)] * 4, [one] * 4)[0].shape == (4, 3, 32, 32)
    assert batch_stitch([scene(50, 50)] * 4, [one] * 4, multiple_of=1)[0].shape == (4, 3, 25, 25)
    assert batch_stitch([scene()] * 4, [one] * 4)[1][0]["image_id"] == 3


def test_coco_boxes() -> None:
    assert xywh_to_xyxy(torch.tensor([[8.0, 4.0, 16.0, 2.0]])).tolist() == [[8, 4, 24, 6]]
    assert xywh_to_xyxy(torch.zeros(0)).shape == (0, 4)


@pytest.mark.parametrize("stitch", [stitch4, batch_stitch])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [scene()] * 3}, "images and targets must be as many, got 3 and 4"),
        ({"images": [], "targets": []}, "images must be a positive multiple of 4, got 0: draw whole groups"),
        ({"images": [scene()] * 6, "targets": [target()] * 6}, "images must be a positive multiple of 4, got 6"),
        (
            {"images": [scene()] * 3 + [torch.zeros(32, 32)]},
            r"images\[3\] must be a tensor \(C, H, W\), got \(32, 32\)",
        ),
        ({"images": [scene()] * 3 + [None]}, r"images\[3\] must be a tensor \(C, H, W\), got NoneType"),
        (
            {"images": [scene()] * 3 + [scene(channels=1)]},
            r"images\[3\] must have the channels and dtype of the first, 3",
        ),
        ({"images": [scene()] * 3 + [scene().double()]}, r"and torch.float32, got 3 and torch.float64"),
        ({"targets": [None] * 4}, r"targets\[0\] must be a dict with a tensor 'boxes', got NoneType"),
        ({"targets": [{"labels": torch.ones(1)}] * 4}, r"targets\[0\] must be a dict with a tensor 'boxes', got dict"),
        (
            {"targets": [target(boxes=torch.zeros(0))] * 4},
            r"'boxes'\] must have shape \(n, 4\), got \(0,\): an image without",
        ),
        (
            {"targets": [target(boxes=torch.zeros(0, 4).long())] * 4},
            "must be floating point, got torch.int64: add .float",
        ),
        ({"targets": [target([0.0, 0.0, float("nan"), 1.0])] * 4}, r"targets\[0\]\['boxes'\] must be finite, got NaN"),
        ({"targets": [target(labels=torch.ones(1))] * 4}, r"\['labels'\] must hold one entry a box, got 1 for 0 boxes"),
        ({"targets": [{"boxes": torch.zeros(0, 4)}] * 4}, r"targets\[0\] must hold 'labels'"),
        (
            {"targets": [target()] * 3 + [target(area=torch.zeros(0))]},
            r"targets\[3\] must have the keys of the first, \['boxes'",
        ),
        (
            {"targets": [target(keypoints=torch.zeros(0, 3))] * 4},
            "holds 'keypoints', which would not move with its image",
        ),
        (
            {"targets": [target(masks=torch.zeros(0, 8, 8))] * 4},
            r"\['masks'\] must have the image's size \(32, 32\), got \(8, 8\)",
        ),
        ({"multiple_of": 0}, "multiple_of must be >= 1, got 0"),
        ({"min_size": -1.0}, "min_size must be >= 0, got -1.0"),
    ],
)
def test_what_is_refused(stitch: Any, change: dict[str, Any], message: str) -> None:
    arguments = {"images": [scene()] * 4, "targets": [target()] * 4} | change
    with pytest.raises(InvalidArgument, match=message):
        stitch(**arguments)


def test_other_refusals() -> None:
    with pytest.raises(UnknownName, match="unknown mode 'linear': did you mean bilinear"):
        stitch4([scene()] * 4, [target()] * 4, "linear")
    with pytest.raises(InvalidArgument, match="multiple_of must be even, got 3: the canvas is halved"):
        stitch4([scene()] * 4, [target()] * 4, multiple_of=3)
    with pytest.raises(InvalidArgument, match="k must be >= 1, got 0"):
        batch_stitch([scene()] * 4, [target()] * 4, k=0)
    with pytest.raises(InvalidArgument, match="images must be a positive multiple of 3, got 4"):
        batch_stitch([scene()] * 4, [target()] * 4, k=3)
