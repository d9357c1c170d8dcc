r"""Noise inside each rank, for local steps: every rank measures its own examples around its own mean gradient.

.. math:: V = \frac{\sum_r f_r V_r}{\sum_r f_r}, \qquad s = \Bigl\|\sum_r \frac{w_r}{\sum_r w_r} g_r\Bigr\|^2

w_r is what the examples of rank r weigh, their number n_r without weights, and f_r is one less than the units that it
has measured. Differences between the ranks' own objectives, which no batch size can lower, are not in V; s is that of
the mean gradient over ranks, which is formed for it: one vector.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.comm import ALONE, Ranks, free
from adadagrad.core.errors import InvalidArgument, InvalidMeasurement
from adadagrad.core.records import GradientStatistics
from adadagrad.core.vectors import squared_norm
from adadagrad.statistics.base import AbstractEstimator, AbstractInstrument, Coefficients, Request
from adadagrad.statistics.planner import StepSize


def open_within(estimator: AbstractEstimator, model: nn.Module, request: Request) -> WithinRanks:
    """Open an estimator that each rank uses for itself.

    Args:
        estimator: One for a single process.
        model: The model.
        request: The numbers wanted, and the ranks.

    Returns:
        The instrument.

    Raises:
        InvalidArgument: Inner products or a coordinate ratio are asked for.
    """
    if request.inner_products or request.coordinates is not None:
        raise InvalidArgument(
            f"estimator {estimator!r} measures inside each rank under local steps, where inner products with the mean "
            "gradient and coordinate ratios are not known: use NormTest, or Worker() for inner product tests"
        )
    alone = replace(request, ranks=ALONE, gradient="shared", watch=None)
    return WithinRanks(estimator.open(model, alone), model, request.ranks)


class WithinRanks(AbstractInstrument):
    """An instrument of one process on each rank, and what they find pooled.

    Args:
        own: This rank's instrument.
        model: The model.
        ranks: The ranks.
    """

    def __init__(self, own: AbstractInstrument, model: nn.Module, ranks: Ranks) -> None:
        self._own, self._model, self._ranks = own, model, ranks
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds spent measuring; see `AbstractInstrument`."""
        return self._own.seconds + self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds = value - self._own.seconds

    @property
    def innermost(self) -> AbstractInstrument:
        """This rank's instrument."""
        return self._own

    @property
    def failure(self) -> Exception | None:
        """Why the step in progress has no statistics on this rank."""
        return self._own.failure

    @property
    def compiled(self) -> str:
        """How a compiled model runs; see `AbstractInstrument.compiled`."""
        return self._own.compiled

    def micro_batch(
        self, num_examples: int | None = None, coefficients: Coefficients = None
    ) -> AbstractContextManager[None]:
        """Return a context for one measured micro-batch; see `AbstractInstrument`."""
        return self._own.micro_batch(num_examples, coefficients)

    def close_group(self) -> None:
        """End the measured part; see `AbstractInstrument`."""
        self._own.close_group()

    def finish(
        self, num_examples: int | None = None, weight_sq_sum: float | None = None, scale: float = 1.0
    ) -> GradientStatistics:
        """Return the statistics over all ranks; see `AbstractInstrument.finish`. A collective.

        Args:
            num_examples: n_r, this rank's examples in the step; None for the measured ones.
            weight_sq_sum: Sum of their squared weights in the mean over ranks; None for equal ones.
            scale: Factor by which this rank's gradient was corrected.

        Returns:
            The record.

        Raises:
            InvalidMeasurement: The measurement of a rank has failed.
        """
        found, error = None, None
        try:
            found = self._own.finish(None, None, scale)
        except Exception as problem:  # the others must hear of it before they wait for a vector
            error = problem
        started = time.perf_counter()
        units = 0 if found is None else found.num_units or found.num_examples
        freedom = max(units - 1, 0)
        own_error = None if found is None else found.variance_trace_error
        n = float(units if num_examples is None else num_examples)
        weight = n / scale  # a rank's gradient was corrected by n_r / w_r
        failed, freedoms, total, squares, silent, count, b, weights = self._ranks.sum(
            float(error is not None),
            float(freedom),
            freedom * found.variance_trace if found is not None and freedom else 0.0,
            0.0 if own_error is None else (freedom * own_error) ** 2,
            float(freedom > 0 and own_error is None),
            float(units),
            n,
            weight,
        )
        if error is not None:
            raise error
        if failed or found is None:
            raise InvalidMeasurement("the measurement of another rank has failed")
        mean = self._mean_gradient(weight / weights)
        s = float(squared_norm([mean]))
        free(mean)
        self._seconds += time.perf_counter() - started
        return GradientStatistics(
            num_examples=int(b),
            grad_norm_sq=s,
            variance_trace=total / freedoms if freedoms else math.nan,
            num_units=int(count),
            kind=found.kind,
            weight_sq_sum=weight_sq_sum,
            variance_trace_error=math.sqrt(squares) / freedoms if freedoms and not silent else None,
        )

    def discard(self) -> None:
        """Forget the step in progress."""
        self._own.discard()

    def costs(self, step: StepSize, device: str) -> tuple[float, float]:
        """Return the modelled costs of this rank's instrument; the vector that is sent is not priced."""
        return self._own.costs(step, device)

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank's instrument has learnt about the model."""
        return self._own.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over again."""
        self._own.load_state_dict(state)

    def _mean_gradient(self, share: float) -> Tensor:
        """Return the mean over ranks of their gradients, of which this one makes up a share, as one vector."""
        with torch.no_grad():
            trained = [p for p in self._model.parameters() if p.requires_grad]
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
            return self._ranks.add_(torch.cat([part.reshape(-1) for part in parts]) * share)
