"""The synthetic scenes: how many are small, where digits lie, and that they repeat."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adadagrad.apps.dynamic_scale.precision import pairwise_iou
from adadagrad.apps.dynamic_scale.scenes import SMALL_AREA, DigitScenes
from adadagrad.core.errors import InvalidArgument

DIGITS, LABELS = torch.ones(10, 8, 8), torch.arange(10)


def make(**options: Any) -> DigitScenes:
    settings: dict[str, Any] = {"digits": DIGITS, "labels": LABELS, "count": 60, "small_fraction": 0.25, "noise": 0.0}
    return DigitScenes(**(settings | options))


def test_exactly_the_asked_share_is_small_and_sides_are_in_their_ranges() -> None:
    small, sizes, counts = 0, set(), set()
    for _, target in make():
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        assert torch.equal(sides[:, 0], sides[:, 1])
        assert torch.equal(target["area"], sides.prod(1))
        kinds = set((target["area"] < SMALL_AREA).tolist())
        assert len(kinds) == 1  # all of a scene are of one kind
        small += kinds == {True}
        sizes |= set(sides[:, 0].int().tolist())
        counts.add(len(sides))
    assert small == 15
    assert sizes <= {*range(8, 15), *range(22, 33)}
    assert {8, 14, 22, 32} <= sizes
    assert counts == {1, 2, 3}


def test_digits_lie_in_their_boxes_and_do_not_overlap() -> None:
    for image, target in make():
        covered = torch.zeros(64, 64, dtype=torch.bool)
        for left, top, right, bottom in target["boxes"].int().tolist():
            assert (image[0, top:bottom, left:right] >= 0.59).all()  # full ink, contrast at least 0.6
            covered[top:bottom, left:right] = True
        assert bool((image[0][~covered] == 0).all())
        overlap = pairwise_iou(target["boxes"], target["boxes"])
        assert torch.equal(overlap > 0, torch.eye(len(overlap), dtype=torch.bool))


def test_labels_are_those_of_the_digits_plus_one() -> None:
    digits = torch.zeros(2, 8, 8)
    digits[1] = 1
    for image, target in make(digits=digits, labels=torch.tensor([3, 7])):
        for label, (left, top, right, bottom) in zip(
            target["labels"].tolist(), target["boxes"].int().tolist(), strict=True
        ):
            assert label == (8 if float(image[0, top:bottom, left:right].mean()) > 0.5 else 4)


def test_targets_hold_what_torchvision_asks_for() -> None:
    _, target = make()[3]
    assert sorted(target) == ["area", "boxes", "image_id", "iscrowd", "labels"]
    assert target["image_id"] == 3
    assert target["labels"].dtype == torch.int64


def test_scenes_repeat_and_every_argument_matters() -> None:
    def prints(**options: Any) -> list[float]:
        return [float(image.sum()) for image, _ in make(**({"noise": 0.1} | options))]

    same = prints()
    assert prints() == same
    for change in (
        {"seed": 1},
        {"noise": 0.2},
        {"size": 72},
        {"small": (9, 9)},
        {"large": (23, 23)},
        {"objects": (2, 2)},
    ):
        assert prints(**change) != same
    assert prints(count=30, small_fraction=0.0)[:5] != same[:5] or prints(small_fraction=1.0) != same
    assert len(make(count=7)) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": torch.ones(0, 8, 8), "labels": torch.ones(0)}, r"digits must be \(m, h, w\) with m labels"),
        ({"labels": torch.ones(3)}, "got .* and 3 labels"),
        ({"count": 0}, "count must be >= 1, got 0"),
        ({"small_fraction": 1.5}, "small_fraction must be between 0 and 1, got 1.5"),
        ({"noise": -1.0}, "noise must be >= 0, got -1.0"),
        ({"small": (9, 8)}, r"small must rise and fit into 64 pixels, got \(9, 8\)"),
        ({"large": (22, 65)}, r"large must rise and fit into 64 pixels, got \(22, 65\)"),
        ({"objects": (0, 3)}, r"objects\[0\] must be >= 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make(**options)
