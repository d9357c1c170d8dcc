r"""`Worker`: the ranks of a step as units; the statistic of DDP-Norm, for a few bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.statistics.base import AbstractEstimator, Request
from adadagrad.statistics.worker_instrument import WorkerInstrument


@dataclass(frozen=True, slots=True)
class Worker(AbstractEstimator):
    r"""Estimate the noise from the mean gradients u_r that the J ranks of a step have before they are averaged.

    .. math:: V = \frac{1}{J-1} \sum_r n_r \|u_r - g\|^2
                = \frac{1}{J-1} \Bigl(\sum_r n_r \|u_r\|^2 - b \|g\|^2\Bigr)

    n_r examples on rank r, b in all, g the mean gradient over all ranks. Unbiased for the trace of one example's
    covariance, for any sizes n_r.

    When to use it: on many ranks, where examples influence each other (batch normalisation), or where even the cost of
    `PerExample` is too much. What breaks it: few ranks; its relative spread is sqrt((b-1)/(J-1)) times that of
    `PerExample` for Gaussian gradients, so with J < 8 average it (`ExponentialAverage`) or use `MicroBatch`, whose
    units are all micro-batches of all ranks. Ranks that read the same examples make V too small. Its standard error is
    not known.
    Cost: one read of the gradients and one message of 48 bytes a rank; inner products keep one gradient. Under local
    steps (`LocalSGD`) also one sum over ranks of a vector of the model's size, at each measurement.

    Under `fully_shard` the norm of a rank's gradient is taken in the backward, before it is cut up and sent, and a rank
    must run its part of a measured step in one micro-batch (others may weigh nothing): `AdaptiveBatch` refuses a
    max_batch_size above the ranks times micro_batch_size.

    A rank's own gradient is read by post-accumulate hooks, before `DistributedDataParallel` averages it: unlike its
    communication hook, of which there is one, they leave the user's in place.

    Raises:
        InvalidArgument: On opening: there is one rank, or the coordinate ratio is asked for, or inner products are and
            the model is sharded.

    Source: Lau, Li, Xu, Liu, Kolar (2024), arXiv 2412.21124, DDP-Norm (the form is from memory, unverified (medium)).
        Differs from the paper: sums of squares in the place of variances by coordinate, so scalars are sent and not
        vectors; units of unequal size are weighted by their size; J - 1 in the denominator, where the paper's
        normalisation is not verified; Vp from unit gradients is our extension.

    Example:
        >>> import adadagrad as ada
        >>> ada.Measure(estimator=ada.Worker(), every=1).estimator  # under torchrun, on two ranks or more
        Worker()
    """

    def open(self, model: nn.Module, request: Request) -> WorkerInstrument:
        """Go to work on a model.

        Args:
            model: The module whose trainable parameters are measured.
            request: The numbers wanted, and the ranks.

        Returns:
            The instrument.

        Raises:
            InvalidArgument: There is one rank, or it is asked for what it cannot give.
        """
        if request.ranks.count < 2:
            raise InvalidArgument(
                "estimator Worker() compares the gradients of several ranks, and there is one: use MicroBatch() or "
                "PerExample(), or start more processes"
            )
        if request.coordinates is not None and request.gradient == "sharded":
            raise InvalidArgument(
                "no estimator gives the coordinate ratio of a sharded model, Worker() neither: use NormTest, or train "
                "with DistributedDataParallel"
            )
        if request.coordinates is not None:
            raise InvalidArgument(
                "estimator Worker() gives no coordinate ratio: use PerExample() or MicroBatch() with CoordinateNormTest"
            )
        if request.gradient == "sharded" and request.inner_products:
            raise InvalidArgument(
                "estimator Worker() cannot multiply a rank's gradient with the mean one of a sharded model, of which "
                "every rank has a part: use MicroBatch() with inner product tests"
            )
        return WorkerInstrument(model, request)
