r"""`MicroBatch`: the micro-batches of one step as units; right for every model, noisier than per example."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.statistics.base import AbstractEstimator, Request
from adadagrad.statistics.unit_instrument import UnitInstrument


@dataclass(frozen=True, slots=True)
class MicroBatch(AbstractEstimator):
    r"""Estimate the noise from the mean gradients u_k of the K micro-batches of one step.

    .. math:: V = \frac{1}{K-1} \sum_k n_k \|u_k - g\|^2

    n_k examples in micro-batch k, g the weighted mean of the u_k. Unbiased for the trace of one example's
    covariance, for any sizes n_k.

    When to use it: where examples influence each other inside a micro-batch (batch normalisation, contrastive
    losses), or a kernel is opaque. The noise is then that of losses on n_k examples. What breaks it: fewer than
    two micro-batches give no information. Its relative spread is sqrt((b-1)/(K-1)) times that of `PerExample` where the
    gradients of single examples are Gaussian, less where their tails are heavier, which averages lose: 3.5 times
    instead of 13 in benchmarks/estimators.py, for b = 512 and K = 4.
    From three micro-batches on it states the standard error of V, which from so few is very rough.
    Cost: two reads of the gradients per micro-batch; inner products keep K gradients.
    Under `fully_shard` a unit is a micro-batch of all ranks together, seen by its shards: K is then the micro-batches
    of one rank. That takes one copy of the shards, and 32 bytes a unit between ranks, 40 with inner products.

    Args:
        units: Micro-batches that the engine makes at least of a measured step, >= 2. More are less noisy and
            smaller.

    Source: Lau, Li, Xu, Liu, Kolar (2024), arXiv 2412.21124, with micro-batches in the place of workers (our
    extension; derived). Differs from the paper: units of unequal size are weighted by their size.

    Example:
        >>> import torch
        >>> from adadagrad.statistics.base import Request
        >>> model = nn.Linear(1, 1, bias=False)
        >>> instrument = MicroBatch().open(model, Request())
        >>> for value in (1.0, 3.0):
        ...     with instrument.micro_batch(num_examples=2, coefficients=1 / 4):
        ...         (model(torch.full((2, 1), value)).mean() / 2).backward()
        >>> instrument.finish().variance_trace  # 2 (1 - 2)^2 + 2 (3 - 2)^2
        4.0
    """

    units: int = 4

    def __post_init__(self) -> None:
        check_integer(2, units=self.units)

    def open(self, model: nn.Module, request: Request) -> UnitInstrument:
        """Go to work on a model.

        Args:
            model: The module whose trainable parameters are measured.
            request: The numbers wanted.

        Returns:
            The instrument.

        Raises:
            InvalidArgument: The coordinate ratio of a sharded model is asked for.
        """
        if request.gradient == "sharded" and request.coordinates is not None:
            raise InvalidArgument(
                "estimator MicroBatch() gives no coordinate ratio of a sharded model: use NormTest or "
                "InnerProductTest, or train with DistributedDataParallel"
            )
        return UnitInstrument(model, request)
