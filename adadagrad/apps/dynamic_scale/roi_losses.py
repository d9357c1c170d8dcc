"""The box loss of each positive, from torchvision's two-stage detectors, which give only its sum.

A recipe::

    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(...)
    feedback, recorder = LossShareFeedback(area_threshold=32**2), RoILosses(model)
    batcher = ScaleBatcher(dataset, 2, ThresholdPolicy(0.1), feedback, seed=0)
    for images, targets in itertools.islice(batcher, steps):
        losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        feedback.update(recorder.losses, recorder.areas)

For models without such a hook there is ``feedback.update_from_targets(targets)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.apps.dynamic_scale.targets import box_areas
from adadagrad.core.errors import InvalidArgument, MissingExtra

BETA = 1 / 9
"""Where torchvision's smooth L1 loss turns from a square to a line."""


class MissingTorchvision(MissingExtra):
    """torchvision, which only this adapter needs, is not installed."""

    def __init__(self) -> None:
        super(ImportError, self).__init__(
            "torchvision is not installed: pip install torchvision, in the build that fits your torch"
        )


def box_loss_vector(box_regression: Tensor, labels: Sequence[Tensor], regression_targets: Sequence[Tensor]) -> Tensor:
    """Return what torchvision's `fastrcnn_loss` adds up: the box loss of each positive.

    Its sum over all positives, divided by the number of labels, is the second value of
    ``fastrcnn_loss(class_logits, box_regression, labels, regression_targets)``.

    Args:
        box_regression: (N, 4 classes), as the box predictor gives it.
        labels: For each image the class of each of its proposals, 0 for the background; N in all.
        regression_targets: For each image what its proposals are to be moved by, (its number, 4).

    Returns:
        (positives,) smooth L1 loss, summed over the four coordinates, in the order of the proposals.
    """
    label = torch.cat(list(labels))
    positive = torch.where(label > 0)[0]
    predicted = box_regression.reshape(len(label), -1, 4)[positive, label[positive]]
    wanted = torch.cat(list(regression_targets))[positive]
    return F.smooth_l1_loss(predicted, wanted, beta=BETA, reduction="none").sum(1)


@final
class RoILosses:
    """Records `losses` and `areas` in every training forward of a Faster or Mask R-CNN, for `LossShareFeedback.update`.

    Wrapping `fastrcnn_loss` itself would not do: it does not see the boxes, and to replace it changes every model of
    the process. So this one listens: forward hooks on the box pooling and the box predictor give the sampled proposals
    and the predictions, from which the head's own matcher and coder, both deterministic, give the rest again. The
    model, its losses and its gradients are left alone. Cost: matching some hundred proposals an image once more.

    Areas are width times height of the true boxes as the head sees them, after torchvision's own resizing (to 800
    pixels by default), so 32^2 there is the paper's unit. Models with a single stage (RetinaNet, SSD, FCOS) have no
    such head.

    Args:
        model: A torchvision detector whose ``roi_heads`` is a `RoIHeads`. Unwrap a DistributedDataParallel first.

    Raises:
        MissingTorchvision: torchvision is not installed.
        InvalidArgument: The model has no such head.

    Source: the hook that arXiv 2004.12432 needs; torchvision's losses are verified in its public code.
    """

    def __init__(self, model: nn.Module) -> None:
        try:
            expected: Any = import_module("torchvision.models.detection.roi_heads").RoIHeads
        except ImportError as error:
            raise MissingTorchvision from error
        heads: Any = dict(model.named_children()).get("roi_heads")
        if not isinstance(heads, expected):
            raise InvalidArgument(
                f"model must have roi_heads of torchvision's class RoIHeads, got {type(model).__name__} with "
                f"{type(heads).__name__}: use feedback.update_from_targets(targets)"
            )
        self.losses = torch.zeros(0)
        """(positives,) box loss of each positive of the latest training forward, without a graph."""
        self.areas = torch.zeros(0)
        """(positives,) area of the true box that each is matched to [pixels^2 of the resized image]."""
        self._heads: Any = heads
        self._targets: list[dict[str, Tensor]] | None = None
        self._proposals: list[Tensor] = []
        self._handles = [
            heads.register_forward_pre_hook(self._see_targets, with_kwargs=True),
            heads.box_roi_pool.register_forward_pre_hook(self._see_proposals),
            heads.box_predictor.register_forward_hook(self._see_predictions),
        ]

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def _see_targets(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._targets = kwargs.get("targets", args[3] if len(args) > 3 else None)

    def _see_proposals(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._proposals = args[1]

    @torch.no_grad()
    def _see_predictions(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        if not self._heads.training or self._targets is None:
            return
        proposals = self._proposals
        boxes = [target["boxes"].to(proposals[0].dtype) for target in self._targets]
        matches, labels = self._heads.assign_targets_to_proposals(
            proposals, boxes, [target["labels"] for target in self._targets]
        )
        matched = [(box if len(box) else box.new_zeros(1, 4))[match] for box, match in zip(boxes, matches, strict=True)]
        self.losses = box_loss_vector(output[1], labels, self._heads.box_coder.encode(matched, proposals))
        self.areas = box_areas(torch.cat(matched)[torch.cat(labels) > 0])
        self._targets, self._proposals = None, []
