"""The small detector: its losses against loops over cells, what it finds, and the training loop with feedback."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from adadagrad.apps.dynamic_scale import AlwaysStitch, LossShareFeedback, NeverStitch, ScaleBatcher, ThresholdPolicy
from adadagrad.apps.dynamic_scale.detector import GridDetector
from adadagrad.apps.dynamic_scale.scenes import DigitScenes
from adadagrad.apps.dynamic_scale.training import evaluate_detector, stack_images, train_detector
from adadagrad.core.errors import InvalidArgument


def boxes(*rows: list[float]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)}


def reference(raw: Tensor, targets: list[dict[str, Tensor]]) -> tuple[float, list[float], list[float]]:
    """Cell by cell: (total loss, loss of each positive, area of each positive's box)."""
    cells, losses, areas = 0.0, [], []
    for image, target in zip(raw, targets, strict=True):
        for row in range(image.shape[1]):
            for column in range(image.shape[2]):
                x, y, own = 4 * column + 2, 4 * row + 2, None
                for left, top, right, bottom in target["boxes"].tolist():
                    width, height, cx, cy = right - left, bottom - top, (left + right) / 2, (top + bottom) / 2
                    if abs(x - cx) <= max(width / 4, 2) and abs(y - cy) <= max(height / 4, 2):
                        goal = [(cx - x) / 8, (cy - y) / 8, math.log(width / 16), math.log(height / 16)]
                        if own is None or width * height < own[0]:
                            own = (width * height, goal)
                logit, *numbers = image[:, row, column].tolist()
                chance = 1 / (1 + math.exp(-logit))
                if own is None:
                    cells -= 0.75 * chance**2 * math.log(1 - chance)
                else:
                    cells -= 0.25 * (1 - chance) ** 2 * math.log(chance)
                    losses.append(sum(abs(a - b) for a, b in zip(numbers, own[1], strict=True)))
                    areas.append(own[0])
    return (cells + sum(losses)) / max(1, len(losses)), losses, areas


def test_losses_equal_the_definition_cell_by_cell() -> None:
    torch.manual_seed(0)
    detector = GridDetector(8).double()
    images = torch.randn(3, 1, 32, 40, dtype=torch.float64)
    targets = [
        boxes([3.0, 2.0, 12.0, 13.0], [10.0, 0.0, 38.0, 30.0], [12.0, 4.0, 36.0, 28.0]),
        boxes(),
        boxes([5.0, 5.0, 6.0, 6.0]),
    ]
    total, losses, areas = reference(detector(images).detach(), targets)
    got = detector.losses(images, targets)
    assert got.total.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(got.boxes, torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(got.areas, torch.tensor(areas, dtype=torch.float64))
    assert {99.0, 576.0, 1.0} <= set(areas)


def test_a_batch_without_objects_has_a_loss_and_no_positives() -> None:
    torch.manual_seed(0)
    detector = GridDetector(8)
    losses = detector.losses(torch.randn(2, 1, 32, 32), [boxes(), boxes()])
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert losses.boxes.shape == losses.areas.shape == (0,)
    assert all(bool(p.grad.isfinite().all()) for p in detector.parameters() if p.grad is not None)
    feedback = LossShareFeedback()
    assert feedback.update(losses.boxes, losses.areas) is None


def test_what_the_head_says_is_what_is_found() -> None:
    """Weights set by hand: every cell says 'a box of 12 by 20 around me'; all but few are suppressed."""
    detector = GridDetector(8)
    with torch.no_grad():
        detector.head.weight.zero_()
        detector.head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, math.log(12 / 16), math.log(20 / 16)]))
    (one,) = detector.detect(torch.zeros(1, 1, 16, 16))
    torch.testing.assert_close(one["boxes"][0], torch.tensor([-4.0, -8.0, 8.0, 12.0]))
    assert one["scores"].tolist() == [0.5] * len(one["scores"])
    assert 1 < len(one["boxes"]) < 16
    assert len(detector.detect(torch.zeros(1, 1, 16, 16), most=1)[0]["boxes"]) == 1
    assert len(detector.detect(torch.zeros(1, 1, 16, 16), least=0.6)[0]["boxes"]) == 0


def test_width_is_the_number_of_channels_and_refused_below_eight() -> None:
    assert sum(p.numel() for p in GridDetector(8).parameters()) < sum(p.numel() for p in GridDetector(16).parameters())
    with pytest.raises(InvalidArgument, match="width must be >= 8, got 4"):
        GridDetector(4)


def scenes(count: int = 40, small: float = 0.1, seed: int = 0) -> DigitScenes:
    strokes = torch.zeros(2, 8, 8)
    strokes[0, :, 3:5], strokes[1, 3:5] = 1, 1
    return DigitScenes(strokes, torch.arange(2), count, small, seed=seed, noise=0.1)


def test_training_records_what_happened_and_feeds_back() -> None:
    torch.manual_seed(0)
    feedback = LossShareFeedback(256)
    batcher = ScaleBatcher(scenes(), 4, ThresholdPolicy(0.1), feedback, seed=0, collate=stack_images)
    record = list(train_detector(GridDetector(8), batcher, 20))
    assert [step.step for step in record] == list(range(1, 21))
    assert record[0].stitched
    for before, after in itertools.pairwise(record):
        assert after.stitched is (before.share is not None and before.share < 0.1)
    assert feedback.share == pytest.approx(record[-1].share)
    stitched = sum(step.stitched for step in record)
    assert record[-1].stitched_fraction == stitched / 20
    assert record[-1].images_read == 4 * 20 + 12 * stitched
    assert 0 < stitched < 20
    assert record[-1].loss < record[0].loss


def test_lr_and_small_area_matter() -> None:
    def last(**options: float) -> tuple[float, float | None]:
        torch.manual_seed(0)
        batcher = ScaleBatcher(scenes(), 4, NeverStitch(), None, seed=0, collate=stack_images)
        step = list(train_detector(GridDetector(8), batcher, 3, **options))[-1]
        return step.loss, step.share

    assert last() == last(lr=2e-3)
    assert last()[0] != last(lr=1e-3)[0]
    assert last(small_area=1e4)[1] == 1.0
    for options, message in (({"lr": 0.0}, "lr must be > 0"), ({"small_area": 1.0, "lr": -1.0}, "lr must be > 0")):
        with pytest.raises(InvalidArgument, match=message):
            last(**options)


def test_always_stitching_never_shows_a_large_object() -> None:
    batcher = ScaleBatcher(scenes(), 4, AlwaysStitch(), None, seed=0, collate=stack_images)
    for step in train_detector(GridDetector(8), batcher, 5, small_area=16**2 + 1):
        assert step.share == 1.0


def test_a_trained_detector_finds_large_objects_and_evaluation_leaves_it_alone() -> None:
    torch.manual_seed(0)
    detector = GridDetector(16)
    small, large = evaluate_detector(detector, scenes(20, 0.5, seed=5))
    assert max(small, large) < 0.2
    batcher = ScaleBatcher(scenes(100), 8, NeverStitch(), None, seed=0, collate=stack_images)
    for _ in train_detector(detector, batcher, 150, lr=5e-3):
        pass
    before = [p.clone() for p in detector.parameters()]
    small, large = evaluate_detector(detector, scenes(20, 0.5, seed=5))
    assert large > 0.6
    assert detector.training
    assert (small, large) == evaluate_detector(detector, scenes(20, 0.5, seed=5), chunk=7)
    assert evaluate_detector(detector, scenes(20, 0.5, seed=5), small_area=1e4)[0] not in (small, large)
    assert math.isnan(evaluate_detector(detector, scenes(20, 0.0, seed=5))[0])
    assert all(torch.equal(a, b) for a, b in zip(before, detector.parameters(), strict=True))
