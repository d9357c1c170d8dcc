"""Average precision against cases worked by hand, and against a slow reference on random boxes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from adadagrad.apps.dynamic_scale.precision import average_precision, pairwise_iou
from adadagrad.core.errors import InvalidArgument


def found(*rows: tuple[float, list[float]]) -> dict[str, Any]:
    return {
        "boxes": torch.tensor([box for _, box in rows]).reshape(-1, 4),
        "scores": torch.tensor([score for score, _ in rows]),
    }


def truth(*boxes: list[float]) -> dict[str, Any]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4)}


A, B, FAR = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [50.0, 50.0, 60.0, 60.0]
LARGE = [0.0, 0.0, 40.0, 40.0]


def share(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0.0) * max(height, 0.0)
    return inner / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner)


def reference(detections: list[dict[str, Any]], targets: list[dict[str, Any]], least: float) -> float:
    """Without ranges: precision at every recall, the best of those to the right, by loops over everything."""
    rows = []
    for number, one in enumerate(detections):
        rows += [(s, number, b) for s, b in zip(one["scores"].tolist(), one["boxes"].tolist(), strict=True)]
    taken: set[tuple[int, int]] = set()
    curve, right = [], 0
    objects = sum(len(target["boxes"]) for target in targets)
    for count, (_, number, box) in enumerate(sorted(rows, key=lambda row: -row[0]), 1):
        best, place = 0.0, None
        for index, other in enumerate(targets[number]["boxes"].tolist()):
            if (number, index) not in taken and share(box, other) > best:
                best, place = share(box, other), index
        if place is not None and best >= least:
            taken.add((number, place))
            right += 1
        curve.append((right / objects, right / count))
    area = 0.0
    for k in range(1, objects + 1):
        area += max((p for r, p in curve if r >= k / objects - 1e-12), default=0.0) / objects
    return area


@pytest.mark.parametrize("least", [0.3, 0.5, 0.75])
def test_equals_the_slow_reference(least: float) -> None:
    generator = torch.Generator().manual_seed(1)
    detections, targets = [], []
    for _ in range(12):
        count = int(torch.randint(1, 4, (), generator=generator))
        corner = torch.rand(count, 2, generator=generator) * 40
        boxes = torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 20], dim=1)
        guesses = torch.cat([boxes, boxes]) + torch.randn(2 * count, 4, generator=generator) * 2
        detections.append({"boxes": guesses, "scores": torch.rand(2 * count, generator=generator)})
        targets.append({"boxes": boxes})
    value = average_precision(detections, targets, iou=least)
    assert value == pytest.approx(reference(detections, targets, least), abs=1e-6)
    assert 0.1 < value < 0.99


@pytest.mark.parametrize(
    ("detections", "targets", "expected"),
    [
        ([found((0.9, A), (0.8, B))], [truth(A, B)], 1.0),
        ([found()], [truth(A)], 0.0),
        ([found((0.9, FAR), (0.8, A))], [truth(A)], 0.5),
        ([found((0.9, A), (0.8, FAR))], [truth(A)], 1.0),  # a wrong one after the last right one costs nothing
        ([found((0.9, A), (0.8, A))], [truth(A, B)], 0.5),  # an object is found once
        ([found((0.9, A)), found((0.8, FAR), (0.7, B))], [truth(A), truth(B)], 0.5 + 1 / 3),
    ],
)
def test_cases_by_hand(detections: Any, targets: Any, expected: float) -> None:
    assert average_precision(detections, targets) == pytest.approx(expected)


def test_objects_out_of_range_are_neither_missed_nor_wrong() -> None:
    targets = [truth(B, LARGE)]
    both = [found((0.9, LARGE), (0.8, B))]
    small = {"areas": (0.0, 256.0)}
    assert average_precision(both, targets, **small) == 1.0  # type: ignore[arg-type]
    assert average_precision(both, targets, areas=(256.0, math.inf)) == 1.0
    assert average_precision([found((0.9, FAR), (0.8, B))], targets, **small) == 0.5  # type: ignore[arg-type]
    large_and_wrong = [found((0.9, [100.0, 100.0, 140.0, 140.0]), (0.8, B))]
    assert average_precision(large_and_wrong, targets, **small) == 1.0  # type: ignore[arg-type]
    assert average_precision(large_and_wrong, targets) == pytest.approx(0.25)


def test_without_an_object_in_range_it_is_not_a_number() -> None:
    assert math.isnan(average_precision([found((0.9, A))], [truth()]))
    assert math.isnan(average_precision([found((0.9, A))], [truth(A)], areas=(256.0, math.inf)))


def test_iou() -> None:
    boxes = torch.tensor([A, B, [5.0, 0.0, 15.0, 10.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[1, 0, 1 / 3, 0], [0, 1, 0, 0], [1 / 3, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(pairwise_iou(boxes, boxes), expected)
    assert pairwise_iou(boxes, torch.zeros(0, 4)).shape == (4, 0)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="detections and targets must be as many, got 1 and 2"):
        average_precision([found()], [truth(), truth()])
