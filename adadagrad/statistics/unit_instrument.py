"""`MicroBatch` at work: the gradients of whole micro-batches, taken in before they are added up."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.comm import all_reduce_sum, sum_scalars
from adadagrad.core.errors import InvalidArgument, InvalidMeasurement, StepError
from adadagrad.core.records import GradientStatistics
from adadagrad.core.vectors import inner_product, squared_norm
from adadagrad.statistics.base import AbstractInstrument, Coefficients, Request
from adadagrad.statistics.coordinate import reduce_ratio
from adadagrad.statistics.coverage import refuse_leftovers
from adadagrad.statistics.planner import RATES, LayerSize, StepSize, plain_seconds


@dataclass(slots=True)
class _Unit:
    """One micro-batch: n_k, C_k = sum c_i, |C_k u_k|^2, and the gradients C_k u_k where they are needed."""

    num_examples: int
    weight: float
    norm_sq: Tensor
    gradients: dict[nn.Parameter, Tensor]


@dataclass(slots=True)
class _Step:
    units: list[_Unit] = field(default_factory=list)
    square_sums: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # sum n_k u_kj^2, float64
    group_norm_sq: float | None = None
    group: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    failure: Exception | None = None


class UnitInstrument(AbstractInstrument):
    """`MicroBatch` at work on one model; see `AbstractInstrument` for the order of calls.

    Args:
        model: The model.
        request: The numbers wanted.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model, self.request, self.seconds = model, request, 0.0
        self._step: _Step | None = None
        self._inside = False

    @contextmanager
    def micro_batch(self, num_examples: int | None = None, coefficients: Coefficients = None) -> Iterator[None]:
        """Take the gradient that the backward inside produces as one unit; see `AbstractInstrument`.

        Raises:
            InvalidArgument: `num_examples` is missing.
            StepError: A micro-batch is being measured already.
        """
        if num_examples is None:
            raise InvalidArgument(
                "num_examples must be given: call micro_batch(num_examples) with how many examples it averages"
            )
        if self._inside:
            raise StepError("the model is being measured already: leave that micro-batch before another one starts")
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self._step is None:
            refuse_leftovers(parameters)
            self._step = _Step()
        step, self._inside = self._step, True
        gradients: dict[nn.Parameter, Tensor] = {}
        twice: set[nn.Parameter] = set()
        hooks = [
            p.register_hook(partial(_receive, gradients, twice, p))  # type: ignore[no-untyped-call]
            for p in parameters.values()
        ]
        try:
            yield
        except BaseException:
            self.discard()
            raise
        finally:
            self._inside = False
            for hook in hooks:
                hook.remove()
        started = time.perf_counter()
        if twice or not gradients:
            reason = "several backward passes ran" if twice else "no backward ran"
            step.failure = InvalidMeasurement(f"{reason} in one measured micro-batch: run one, on the added losses")
        elif not (weight := _total_weight(coefficients, num_examples)) > 0:
            step.failure = InvalidMeasurement(f"the weights of a measured micro-batch must add up to > 0, got {weight}")
        else:
            self._add(step, gradients, num_examples, weight)
        self.seconds += time.perf_counter() - started

    def close_group(self) -> None:
        """Note the measured part's gradient before other micro-batches add to it."""
        if self._step is None:
            return
        gradients = self._gradients()
        self._step.group_norm_sq = float(squared_norm(list(gradients.values())))
        if self.request.coordinates is not None:
            self._step.group = {p: gradient.detach().clone() for p, gradient in gradients.items()}

    def finish(
        self, num_examples: int | None = None, weight_sq_sum: float | None = None, scale: float = 1.0
    ) -> GradientStatistics:
        """Return the statistics of the step; see `AbstractInstrument.finish`.

        Raises:
            InvalidMeasurement: No micro-batch was measured, or the measurement failed.
        """
        started = time.perf_counter()
        step, self._step = self._step, None
        if step is None:
            raise InvalidMeasurement("nothing was measured: run forward and backward inside the measurement first")
        if step.failure is not None:
            raise step.failure
        with torch.no_grad():
            statistics = self._statistics(step, num_examples, weight_sq_sum, scale)
        self.seconds += time.perf_counter() - started
        return statistics

    def discard(self) -> None:
        """Forget the step in progress."""
        self._step = None

    def costs(self, step: StepSize, device: str) -> tuple[float, float]:
        """Return the modelled costs; see `AbstractInstrument.costs`. Positions are not known and count as 1."""
        layers = [LayerSize(p.numel(), 1, 0) for p in self.model.parameters() if p.requires_grad]
        rates = RATES.get(device, RATES["cuda"])
        read = sum(4 * layer.weights for layer in layers) / rates.bytes + 2 * rates.call * len(layers)
        return plain_seconds(layers, step, device), read * (step.measured_micro_batches + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is nothing to learn about the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        return {p: p.grad for p in self.model.parameters() if p.requires_grad and p.grad is not None}

    def _add(self, step: _Step, gradients: dict[nn.Parameter, Tensor], n: int, weight: float) -> None:
        kept = {p: gradient.clone() for p, gradient in gradients.items()} if self.request.inner_products else {}
        step.units.append(_Unit(n, weight, squared_norm(list(gradients.values())), kept))
        if self.request.coordinates is not None:
            for p, gradient in gradients.items():
                square = (gradient.double() / weight).square() * n
                step.square_sums[p] = step.square_sums.get(p, 0) + square

    def _statistics(
        self, step: _Step, num_examples: int | None, weight_sq_sum: float | None, scale: float
    ) -> GradientStatistics:
        gradients = self._gradients()
        s = float(squared_norm(list(gradients.values())))
        units = step.units
        squares = sum(unit.num_examples * float(unit.norm_sq) / unit.weight**2 for unit in units)
        count, total, weight, squares = sum_scalars(
            len(units), sum(unit.num_examples for unit in units), sum(unit.weight for unit in units), squares
        )
        # The mean gradient over the measured units: .grad itself (scaled since), or the noted part of it.
        divisor = weight * (scale if step.group_norm_sq is None else 1.0)
        mean_sq = (s if step.group_norm_sq is None else step.group_norm_sq) / divisor**2
        freedom = count - 1
        variance = max(squares - total * mean_sq, 0.0) / freedom if freedom > 0 else math.nan
        inner = _inner_product_variance(units, gradients, total, freedom) if self.request.inner_products else None
        ratio = None
        if self.request.coordinates is not None and freedom > 0:
            group = step.group or gradients
            order = [p for p in gradients if p in step.square_sums or p in group]
            means = [group[p].double() / divisor for p in order]
            q = [all_reduce_sum(step.square_sums.get(p, torch.zeros_like(p, dtype=torch.float64))) for p in order]
            spread = [((a - total * m.square()) / freedom).clamp_(min=0) for a, m in zip(q, means, strict=True)]
            moment = self.request.second_moment
            moments = None if moment is None else [moment(p) for p in order]
            ratio = reduce_ratio(spread, [gradients[p] for p in order], self.request.coordinates, moments)
        return GradientStatistics(
            num_examples=num_examples if num_examples is not None else int(total),
            grad_norm_sq=s,
            variance_trace=variance,
            inner_product_variance=inner,
            coordinate_ratio=ratio,
            num_units=int(count),
            kind="micro_batch",
            weight_sq_sum=weight_sq_sum,
        )


def _inner_product_variance(
    units: list[_Unit], gradients: dict[nn.Parameter, Tensor], total: float, freedom: float
) -> float:
    """Return sum n_k (p_k - pbar)^2 / (K - 1) over all ranks with p_k = <u_k, g>; our extension, derived."""
    products = []
    for unit in units:
        shared = [p for p in unit.gradients if p in gradients]
        product = inner_product([unit.gradients[p] for p in shared], [gradients[p] for p in shared])
        products.append(float(product) / unit.weight)
    (weighted,) = sum_scalars(sum(unit.num_examples * p for unit, p in zip(units, products, strict=True)))
    deviations = [unit.num_examples * (p - weighted / total) ** 2 for unit, p in zip(units, products, strict=True)]
    (spread,) = sum_scalars(sum(deviations))
    return spread / freedom if freedom > 0 else math.nan


def _receive(
    gradients: dict[nn.Parameter, Tensor], twice: set[nn.Parameter], p: nn.Parameter, gradient: Tensor
) -> None:
    """Take in a parameter's gradient of this backward, before it is added to `.grad`."""
    if p in gradients:
        twice.add(p)
    gradients[p] = gradient.detach()


def _total_weight(coefficients: Coefficients, n: int) -> float:
    """Return C_k = sum c_i."""
    if callable(coefficients):
        coefficients = coefficients()
    if coefficients is None:
        return 1.0
    if isinstance(coefficients, int | float):
        return n * float(coefficients)
    return float(torch.as_tensor(coefficients, dtype=torch.float64).sum())
