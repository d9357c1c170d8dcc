"""The recorder for torchvision's heads, against stand-ins with the same methods: torchvision itself is not needed."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.apps.dynamic_scale import LossShareFeedback, MissingTorchvision, RoILosses, box_loss_vector
from adadagrad.apps.dynamic_scale.precision import pairwise_iou
from adadagrad.core.errors import InvalidArgument, MissingExtra

CLASSES = 4


def scalar_losses(
    logits: Tensor, regression: Tensor, labels: Sequence[Tensor], goals: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """A stand-in of `fastrcnn_loss`: one positive after the other, two scalars."""
    label, goal = torch.cat(list(labels)), torch.cat(list(goals))
    total = regression.new_zeros(())
    for row in range(len(label)):
        if label[row] > 0:
            predicted = regression[row].reshape(CLASSES, 4)[label[row]]
            for difference in (predicted - goal[row]).abs():
                total = total + (difference**2 * 9 / 2 if difference < 1 / 9 else difference - 1 / 18)
    return F.cross_entropy(logits, label), total / len(label)


class Coder:
    def encode(self, boxes: list[Tensor], proposals: list[Tensor]) -> list[Tensor]:
        return [(box - proposal) / 10 for box, proposal in zip(boxes, proposals, strict=True)]


class Pool(nn.Module):
    def forward(self, features: Tensor, proposals: list[Tensor], shapes: list[Any]) -> Tensor:
        return torch.cat(proposals)


class Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Linear(4, CLASSES), nn.Linear(4, 4 * CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(x / 32), self.boxes(x / 32)


class RoIHeads(nn.Module):
    """A stand-in: samples half of the proposals, and computes its losses on them."""

    def __init__(self) -> None:
        super().__init__()
        self.box_roi_pool, self.box_predictor, self.box_coder = Pool(), Predictor(), Coder()
        self.sampled: list[tuple[Tensor, Tensor]] = []

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        matches, found = [], []
        for proposal, box, label in zip(proposals, boxes, labels, strict=True):
            if len(box) == 0:
                matches.append(torch.zeros(len(proposal), dtype=torch.int64))
                found.append(torch.zeros(len(proposal), dtype=torch.int64))
                continue
            best, match = pairwise_iou(proposal, box).max(1)
            matches.append(match)
            found.append(torch.where(best >= 0.5, label[match], 0))
        return matches, found

    def forward(
        self,
        features: Tensor,
        proposals: list[Tensor],
        shapes: list[Any],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        if targets is not None:
            boxes = [target["boxes"] for target in targets]
            proposals = [torch.cat([a, b]) for a, b in zip(proposals, boxes, strict=True)]
            proposals = [p[torch.randperm(len(p))[: (len(p) + 1) // 2]] for p in proposals]
            matches, labels = self.assign_targets_to_proposals(proposals, boxes, [t["labels"] for t in targets])
            padded = [box if len(box) else torch.zeros(1, 4) for box in boxes]
            matched = [box[match] for box, match in zip(padded, matches, strict=True)]
            goals = self.box_coder.encode(matched, proposals)
            self.sampled = [
                (label, (m[:, 2] - m[:, 0]) * (m[:, 3] - m[:, 1])) for label, m in zip(labels, matched, strict=True)
            ]
        logits, regression = self.box_predictor(self.box_roi_pool(features, proposals, shapes))
        if targets is None:
            return {}
        classes, box = scalar_losses(logits, regression, labels, goals)
        return {"loss_classifier": classes, "loss_box_reg": box}


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.roi_heads = RoIHeads()

    def forward(self, proposals: list[Tensor], targets: Any = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.roi_heads(torch.zeros(1), proposals, [], targets)
        return found


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the adapter imports, with the stand-in in its place."""
    name = "torchvision"
    for part in ("", ".models", ".detection", ".roi_heads"):
        name += part
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[name].RoIHeads = RoIHeads  # type: ignore[attr-defined]


def scene(seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with objects and proposals around them, one without."""
    torch.manual_seed(seed)
    proposals, targets = [], []
    for count in (3, 0, 2):
        corner, sides = torch.rand(count, 2) * 40, 8 + torch.rand(count, 2) * 40
        boxes = torch.cat([corner, corner + sides], dim=1)
        near = boxes.repeat(4, 1) + torch.randn(4 * count, 4) * 2
        far = torch.tensor([[90.0, 90.0, 99.0, 99.0]]).repeat(5, 1)
        proposals.append(torch.cat([near, far]))
        targets.append({"boxes": boxes, "labels": torch.randint(1, CLASSES, (count,))})
    return proposals, targets


@pytest.mark.usefixtures("torchvision")
def test_what_is_recorded_adds_up_to_the_models_own_loss() -> None:
    model = Detector()
    recorder = RoILosses(model)
    for seed in range(5):
        proposals, targets = scene(seed)
        losses = model(proposals, targets)
        labels = torch.cat([label for label, _ in model.roi_heads.sampled])
        areas = torch.cat([area for _, area in model.roi_heads.sampled])[labels > 0]
        assert len(recorder.losses) == int((labels > 0).sum()) > 3
        torch.testing.assert_close(recorder.losses.sum() / len(labels), losses["loss_box_reg"])
        torch.testing.assert_close(recorder.areas, areas)
        assert not recorder.losses.requires_grad
        share = LossShareFeedback(700).update(recorder.losses, recorder.areas)
        assert share == pytest.approx(float(recorder.losses[areas < 700].sum() / recorder.losses.sum()))


@pytest.mark.usefixtures("torchvision")
def test_listening_changes_neither_losses_nor_gradients_and_ends() -> None:
    results = []
    for listen in (False, True):
        torch.manual_seed(0)
        model = Detector()
        recorder = RoILosses(model) if listen else None
        proposals, targets = scene(1)
        sum(model(proposals, targets).values()).backward()  # type: ignore[union-attr]
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert recorder is not None
    before = recorder.losses
    model.eval()
    model(scene(2)[0])  # without targets, and then with them in evaluation
    model(*scene(2))
    assert recorder.losses is before
    model.train()
    recorder.remove()
    model(*scene(3))
    assert recorder.losses is before


@pytest.mark.usefixtures("torchvision")
def test_images_without_objects_give_no_positives() -> None:
    model = Detector()
    recorder = RoILosses(model)
    proposals, _ = scene(1)
    model(proposals, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 3)
    assert recorder.losses.shape == recorder.areas.shape == (0,)


def test_the_vector_is_that_of_the_scalar_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [torch.tensor([0, 3, 1, 0]), torch.tensor([2])]
    goals = [torch.randn(4, 4, generator=generator).double(), torch.randn(1, 4, generator=generator).double()]
    regression = torch.randn(5, 4 * CLASSES, generator=generator).double() * 0.3
    vector = box_loss_vector(regression, labels, goals)
    _, scalar = scalar_losses(torch.zeros(5, CLASSES).double(), regression, labels, goals)
    assert vector.shape == (3,)
    torch.testing.assert_close(vector.sum() / 5, scalar, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("torchvision")
def test_a_model_without_such_a_head_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"got Linear with NoneType: use feedback\.update_from"):
        RoILosses(nn.Linear(1, 1))
    model = nn.Module()
    model.roi_heads = nn.Linear(1, 1)
    with pytest.raises(
        InvalidArgument, match="model must have roi_heads of torchvision's class RoIHeads, got Module with"
    ):
        RoILosses(model)


def test_a_missing_torchvision_is_a_typed_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.models.detection.roi_heads", raising=False)
    with pytest.raises(MissingTorchvision, match="torchvision is not installed: pip install torchvision, in the build"):
        RoILosses(Detector())
    assert issubclass(MissingTorchvision, MissingExtra)
