"""Accuracy and loss on held-out data, with a batch size of its own, and without a trace in the training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

EVALUATION_BATCH_SIZE = 1000
"""Fixed, so that no accuracy depends on the batch size of the training."""


class Evaluator:
    """Evaluates a classifier, evenly in samples.

    Args:
        data: Pairs (input, class number).
        split: What the data is, ``"val"`` or ``"test"``; the metrics are called after it.
        total_samples: The run's budget.
        times: How many evaluations it is to have.
    """

    def __init__(self, data: Dataset[Any], split: str, total_samples: int, times: int) -> None:
        self.split = split
        self._data = data
        self._total, self._times = total_samples, times

    def is_due(self, before: float, after: float) -> bool:
        """Say whether an evaluation falls on the step that just ended; the last step has one always.

        Args:
            before: Progress before the step, in examples.
            after: Progress after it.

        Returns:
            Whether one of the evenly spaced marks lies in it.
        """
        if after >= self._total:
            return True
        return before * self._times // self._total < after * self._times // self._total

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Evaluate, and leave every module's mode and every random state as they were.

        Args:
            model: Returns logits (n, classes).

        Returns:
            ``<split>/accuracy`` between 0 and 1 and ``<split>/loss``, means over all examples.
        """
        modes = [(module, module.training) for module in model.modules()]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        correct, loss, count = 0, 0.0, 0
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng():
                for inputs, labels in self._batches():
                    logits, targets = model(inputs.to(device)), labels.to(device)
                    correct += int((logits.argmax(dim=1) == targets).sum())
                    loss += float(F.cross_entropy(logits, targets, reduction="sum"))
                    count += len(targets)
        finally:
            for module, training in modes:
                module.training = training
        return {f"{self.split}/accuracy": correct / count, f"{self.split}/loss": loss / count}

    def _batches(self) -> Iterable[Any]:
        """All examples in order; tensors are sliced, which is a hundred times faster than collating rows."""
        if isinstance(self._data, TensorDataset):
            return zip(*(torch.split(part, EVALUATION_BATCH_SIZE) for part in self._data.tensors), strict=True)
        return DataLoader(self._data, batch_size=EVALUATION_BATCH_SIZE, generator=torch.Generator())
