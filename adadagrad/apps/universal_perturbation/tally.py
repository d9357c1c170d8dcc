"""Count predictions batch by batch; whole numbers, so that their sums do not depend on the batches."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from adadagrad.apps.universal_perturbation.perturbation import Perturbation
from adadagrad.apps.universal_perturbation.robustness import ClassRobustness, RobustnessReport


@final
class Tally:
    """Counts for one perturbation on one model.

    Args:
        target: The class whose share is asked for, or None.
    """

    def __init__(self, target: int | None) -> None:
        self.target = target
        self._rows = torch.zeros(4, 0, dtype=torch.int64)
        """(4, classes) by true class: images, right without, right with the perturbation, changed by it."""
        self._predicted = torch.zeros(0, dtype=torch.int64)
        """(classes,): how often each is predicted with the perturbation."""

    def add(self, truth: Tensor, clean: Tensor, perturbed: Tensor, classes: int) -> None:
        """Count one batch.

        Args:
            truth: (n,) labels.
            clean: (n,) predictions without the perturbation.
            perturbed: (n,) predictions with it.
            classes: How many classes the model knows, the same for every batch.
        """
        which = (torch.ones_like(truth, dtype=torch.bool), clean == truth, perturbed == truth, clean != perturbed)
        rows = torch.stack([torch.bincount(truth[chosen], minlength=classes) for chosen in which]).cpu()
        predicted = torch.bincount(perturbed, minlength=classes).cpu()
        self._rows = rows + self._rows if self._rows.numel() else rows
        self._predicted = predicted + self._predicted if self._predicted.numel() else predicted

    def report(self, perturbation: Perturbation, random_sign: RobustnessReport | None) -> RobustnessReport:
        """Return the shares of all images counted, at least one.

        Args:
            perturbation: What was evaluated.
            random_sign: The baseline's report.
        """
        images, right, still_right, changed = self._rows.sum(1).tolist()
        dominant = int(self._predicted.argmax())
        share = None if self.target is None else int(self._predicted[self.target]) / images
        return RobustnessReport(
            method=perturbation.method,
            eps=perturbation.eps,
            linf_norm=perturbation.linf_norm,
            gradient_count=perturbation.gradient_count,
            n_samples=images,
            clean_accuracy=right / images,
            adversarial_accuracy=still_right / images,
            fooling_ratio=changed / images,
            fooling_rate=1 - still_right / images,
            per_class=tuple(
                ClassRobustness(
                    label=label,
                    count=count,
                    clean_accuracy=a / count,
                    adversarial_accuracy=b / count,
                    fooling_ratio=c / count,
                )
                for label, (count, a, b, c) in enumerate(self._rows.T.tolist())
                if count
            ),
            dominant_class=dominant,
            dominant_share=int(self._predicted[dominant]) / images,
            target=self.target,
            target_rate=share,
            random_sign=random_sign,
        )
