"""What both estimators keep of a step in progress: the gradient of its measured part, and why there is no statistic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from adadagrad.core.errors import AdadagradError, InvalidMeasurement
from adadagrad.core.vectors import squared_norm

Norm: TypeAlias = Callable[[Mapping[nn.Parameter, Tensor]], float]


def over_ranks(ranks: int, gradients: Mapping[nn.Parameter, Tensor]) -> float:
    """Return |G|^2 of the ranks' sums together from the shards of their mean, whose norm is smaller by their number."""
    return ranks**2 * float(squared_norm(list(gradients.values())))


@dataclass(slots=True)
class MeasuredPart:
    """The measured part of a step.

    Args:
        norm_sq: |G|^2 of its weighted sum, noted where the step goes on without measuring; None where it does not.
        gradients: G itself, for coordinates of a part.
        failure: Why there will be no statistics: the first error.
    """

    norm_sq: float | None = None
    gradients: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    failure: Exception | None = None

    def close(self, gradients: Mapping[nn.Parameter, Tensor], *, copy: bool, norm: Norm | None = None) -> None:
        """Note the part's gradient before other micro-batches add to it; an error is noted instead.

        Args:
            gradients: What `.grad` holds now.
            copy: Whether the gradient itself will be needed.
            norm: What else looks at the gradient, and returns |G|^2; None for nothing else.
        """
        with self.protect():
            self.norm_sq = float(squared_norm(list(gradients.values()))) if norm is None else norm(gradients)
            if copy:
                self.gradients = {p: gradient.detach().clone() for p, gradient in gradients.items()}

    @contextmanager
    def protect(self) -> Iterator[None]:
        """Turn an error into a failure of the measurement: the step's gradient is whole, and training goes on.

        Yields:
            Nothing; no graph is built inside.
        """
        try:
            with torch.no_grad():
                yield
        except AdadagradError as error:
            self.failure = self.failure or error
        except Exception as error:  # out of memory, most likely
            failure = InvalidMeasurement(f"the measurement failed ({type(error).__name__}: {error})")
            failure.__cause__ = error
            self.failure = self.failure or failure
