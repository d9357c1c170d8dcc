"""CABS: as many examples as keep the noise of a gradient step in proportion to the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from adadagrad.core.checks import check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Observation, quotient
from adadagrad.policies.base import AbstractPolicy, check_averaging


@dataclass(frozen=True, slots=True)
class CABS(AbstractPolicy):
    r"""Ask for a batch that grows with the learning rate and the gradient's variance, and as the loss falls.

    .. math:: b = c \, \frac{\mathrm{lr} \; \xi}{F},
              \qquad \xi = \sum_j \Bigl( \frac{1}{n} \sum_i g_{ij}^2 - g_j^2 \Bigr) = \Bigl(1 - \frac{1}{n}\Bigr) V

    In code: c is `scale`, lr `observation.lr`, V `variance_trace`, n `num_examples`, and F the loss, averaged if the
    engine averages, less `loss_offset`.

    Use it with plain SGD and a loss that can fall to about zero, in place of a decay of the learning rate: a larger one
    asks for larger batches. The sizes also fall, where the variance does. A loss multiplied by k asks for the same
    batch if the rate is divided by k, as SGD wants it; with the same rate it asks for k times as many. It breaks where
    the loss has a floor (b then grows without end as F nears it: put the floor into `loss_offset`), with momentum and
    with adaptive optimizers, whose steps are not lr g, and during a warm-up from lr = 0, where it asks for the smallest
    batch that is allowed. Give it no `rate`: with a learning rate that follows the batch, each drives the other, and
    linear scaling takes the batch to one of its bounds. A loss at or below the offset asks for an infinite batch, or
    NaN without variance; both hold unless `Bounds.on_infinite` says otherwise. Constant time and memory.

    Args:
        scale: c, > 0, dimensionless; 1 in the paper. Smaller asks for smaller batches.
        loss_offset: What the loss cannot fall below, in its units; 0 in the paper.
        averaging: Decay of the exponential averages, in (0, 1): of V per measured step, of the loss per step. None
            takes each step by itself.

    Raises:
        InvalidArgument: scale <= 0 or not finite; loss_offset is not a finite number; averaging is neither None nor
            in (0, 1).

    Source: Balles, Romero, Hennig (2017), "Coupling Adaptive Batch Sizes with Learning Rates", arXiv 1612.05086, eq. 22
        (verified in ProbabilisticNumerics/cabs at 456728b, README, and in f-dangel/cockpit, which cites the equation).
    Differs from the paper: the request is neither rounded nor clipped to [16, 2048] here; the run's bounds do both. The
        averages carry no start values, where the code starts at xi = 0 and F = 1 and so is biased early on.
        `loss_offset` is our extension.

    Example:
        >>> from adadagrad.core.records import GradientStatistics
        >>> stats = GradientStatistics(num_examples=8, grad_norm_sq=4.0, variance_trace=160.0)
        >>> CABS().required_batch_size(Observation(gradient=stats, lr=0.25, loss=0.5))  # 0.25 * (7/8 * 160) / 0.5
        70.0
    """

    needs: ClassVar[frozenset[str]] = frozenset({"variance_trace"})
    monotone: ClassVar[bool] = False

    scale: float = 1.0
    loss_offset: float = 0.0
    averaging: float | None = 0.95

    def __post_init__(self) -> None:
        check_positive(scale=self.scale)
        if not isinstance(self.loss_offset, int | float) or not math.isfinite(self.loss_offset):
            raise InvalidArgument(f"loss_offset must be a finite number, got {self.loss_offset!r}")
        check_averaging(self.averaging)

    def required_batch_size(self, observation: Observation) -> float:
        """Return what the rule asks for, neither rounded nor bounded.

        Args:
            observation: With statistics, the learning rate of the step, and its loss or the average of losses.

        Returns:
            The batch size [examples].

        Raises:
            InvalidArgument: The learning rate is missing, or both losses are.
        """
        v, n = self.measured(observation, "variance_trace", "num_examples")
        if observation.lr is None:
            raise InvalidArgument("CABS needs observation.lr, got None: give the learning rate of the step just taken")
        loss = observation.loss if observation.loss_average is None else observation.loss_average
        if loss is None:
            raise InvalidArgument("CABS needs observation.loss, got None: give the mean loss of the step just taken")
        excess = loss - self.loss_offset
        return quotient(self.scale * observation.lr * (1 - 1 / n) * v, 0.0 if excess <= 0 else excess)
