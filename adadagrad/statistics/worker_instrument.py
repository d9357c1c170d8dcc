"""`Worker` at work: a rank's own gradient, seen before it is averaged, as one unit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.comm import free
from adadagrad.core.errors import InvalidArgument, InvalidMeasurement, UncoveredParameter
from adadagrad.core.records import GradientStatistics
from adadagrad.core.vectors import inner_product, squared_norm
from adadagrad.statistics.base import AbstractInstrument, Coefficients, Request
from adadagrad.statistics.compiled import how_it_runs
from adadagrad.statistics.layer_costs import RATES, LayerSize
from adadagrad.statistics.local_gradients import watched
from adadagrad.statistics.measured_part import MeasuredPart
from adadagrad.statistics.planner import StepSize, plain_seconds
from adadagrad.statistics.standard_errors import grad_norm_sq_error
from adadagrad.statistics.unit_instrument import total_weight


@dataclass(slots=True)
class _Unit:
    """This rank's gradient so far: G = sum c_i g_i of its examples, known by parameter."""

    num_examples: int = 0
    weight: float = 0.0
    norms: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # |G|^2
    gradients: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # G, where inner products are wanted
    part: MeasuredPart = field(default_factory=MeasuredPart)


class WorkerInstrument(AbstractInstrument):
    """`Worker` at work on one model; see `AbstractInstrument` for the order of calls.

    Args:
        model: The model.
        request: The numbers wanted, and the ranks.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model, self.request, self.seconds = model, request, 0.0
        self._unit: _Unit | None = None

    @property
    def compiled(self) -> str:
        """How a compiled model runs; see `AbstractInstrument.compiled`."""
        return how_it_runs(self.model, "compiled")

    @property
    def failure(self) -> Exception | None:
        """Why the step in progress has no statistics."""
        return None if self._unit is None else self._unit.part.failure

    @contextmanager
    def micro_batch(self, num_examples: int | None = None, coefficients: Coefficients = None) -> Iterator[None]:
        """Take note of the gradients that the backward inside leaves; see `AbstractInstrument`.

        Raises:
            InvalidArgument: `num_examples` is missing.
            UncoveredParameter: Kept for `finish`: a rank of a sharded model ran several micro-batches.
        """
        if num_examples is None:
            raise InvalidArgument(
                "num_examples must be given: call micro_batch(num_examples) with how many examples it averages"
            )
        unit = self._unit = _Unit() if self._unit is None else self._unit
        sharded = self.request.gradient == "sharded"
        norms = {} if sharded else unit.norms  # of this micro-batch alone, or of the local sum so far
        try:
            with self._watching(unit, norms):
                yield
        except BaseException:
            self.discard()
            raise
        with unit.part.protect():
            weight = total_weight(coefficients, num_examples)
            if sharded and unit.weight > 0 and weight > 0:
                raise UncoveredParameter(
                    "Worker() sees the gradient of one micro-batch of a sharded model, and this rank ran several: "
                    "raise micro_batch_size, or use MicroBatch()"
                )
            if weight > 0:
                unit.num_examples, unit.norms = unit.num_examples + num_examples, norms
            unit.weight += weight

    def close_group(self) -> None:
        """Refuse: a rank's gradient is that of all its examples."""
        if self._unit is not None:
            self._unit.part.failure = InvalidMeasurement("Worker measures all examples of a step")

    def finish(
        self, num_examples: int | None = None, weight_sq_sum: float | None = None, scale: float = 1.0
    ) -> GradientStatistics:
        """Return the statistics of the step; see `AbstractInstrument.finish`. A collective of all ranks.

        Raises:
            InvalidMeasurement: No micro-batch was measured, or the measurement failed.
        """
        started = time.perf_counter()
        unit, self._unit = self._unit, None
        if unit is None:
            raise InvalidMeasurement("nothing was measured: run forward and backward inside the measurement first")
        if unit.part.failure is not None:
            raise unit.part.failure
        with torch.no_grad():
            if self.request.gradient == "local":
                n = unit.num_examples if num_examples is None else num_examples
                statistics = self._of_local_steps(unit, weight_sq_sum, n / scale)
            else:
                statistics = self._of_a_shared_step(unit, weight_sq_sum, scale)
        self.seconds += time.perf_counter() - started
        return statistics

    def discard(self) -> None:
        """Forget the step in progress."""
        self._unit = None

    def costs(self, step: StepSize, device: str) -> tuple[float, float]:
        """Return the modelled costs; see `AbstractInstrument.costs`. Positions are not known and count as 1."""
        layers = [LayerSize(p.numel(), 1, 0) for p in self.model.parameters() if p.requires_grad]
        rates = RATES.get(device, RATES["cuda"])
        read = sum(4 * layer.weights for layer in layers) / rates.bytes + 2 * rates.call * len(layers)
        return plain_seconds(layers, step, device), read * step.measured_micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is nothing to learn about the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""

    def _watching(self, unit: _Unit, norms: dict[nn.Parameter, Tensor]) -> AbstractContextManager[None]:
        """Look at every parameter's local sum as it grows: the last look counts. Sharded, there must be one look."""
        if self.request.gradient == "local":
            return nullcontext()  # `.grad` stays the rank's own

        def receive(p: nn.Parameter, gradient: Tensor) -> None:
            started = time.perf_counter()
            with unit.part.protect():
                if p in norms and self.request.gradient == "sharded":
                    raise InvalidMeasurement(
                        "several backward passes ran in one measured micro-batch of a sharded model: run one, on the "
                        "added losses, or use MicroBatch()"
                    )
                norms[p] = squared_norm([gradient])
                if self.request.inner_products:
                    unit.gradients[p] = gradient.clone()
            self.seconds += time.perf_counter() - started

        if self.request.watch is not None:
            return self.request.watch(receive)
        return watched([p for p in self.model.parameters() if p.requires_grad], receive)

    def _of_a_shared_step(self, unit: _Unit, weight_sq_sum: float | None, scale: float) -> GradientStatistics:
        """Return the statistics where `.grad` holds the mean over all ranks, and the unit was seen before it did."""
        gradients = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        s = float(squared_norm(list(gradients.values())))
        norm_sq = sum(float(norm) for norm in unit.norms.values()) / unit.weight**2 if unit.weight > 0 else 0.0
        product = None
        if self.request.inner_products:
            shared = [p for p in unit.gradients if p in gradients]
            found = float(inner_product([unit.gradients[p] for p in shared], [gradients[p] for p in shared]))
            product = found / unit.weight if unit.weight > 0 else 0.0
        return self._statistics(unit, norm_sq, s, product, weight_sq_sum, scale)

    def _of_local_steps(self, unit: _Unit, weight_sq_sum: float | None, weight: float) -> GradientStatistics:
        """Return the statistics where `.grad` holds this rank's own mean, of which the mean over ranks is formed.

        Args:
            unit: The rank's examples.
            weight_sq_sum: Sum of the squared weights in the mean over ranks.
            weight: What the rank's examples weigh in it.

        Returns:
            The record.
        """
        ranks = self.request.ranks
        trained = [p for p in self.model.parameters() if p.requires_grad]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]  # as many on all ranks
        unit.weight = weight if unit.weight > 0 else 0.0
        share = unit.weight / ranks.sum(unit.weight)[0]
        own = torch.cat([part.flatten() for part in parts])
        mean = ranks.add_(own * share)
        s = float(squared_norm([mean]))
        product = float(inner_product([own], [mean])) if self.request.inner_products else None
        free(mean)
        return self._statistics(unit, float(squared_norm([own])), s, product, weight_sq_sum, None)

    def _statistics(
        self,
        unit: _Unit,
        norm_sq: float,
        s: float,
        product: float | None,
        weight_sq_sum: float | None,
        scale: float | None,
    ) -> GradientStatistics:
        """Return V and Vp after one message of 48 bytes; `norm_sq` is |u_r|^2 and `product` <u_r, g>."""
        n, along = unit.num_examples, 0.0 if product is None else product - s
        count, total, weight, squares, deviation, deviations = self.request.ranks.sum(
            float(n > 0), float(n), unit.weight, n * norm_sq, n * along, n * along * along
        )
        mean_sq = s if scale is None else s / (weight * scale) ** 2
        freedom, b = count - 1, int(total)
        inner = None if product is None else (deviations - deviation**2 / total) / freedom
        return GradientStatistics(
            num_examples=b,
            grad_norm_sq=s,
            variance_trace=max(squares - total * mean_sq, 0.0) / freedom,
            inner_product_variance=inner,
            num_units=int(count),
            kind="worker",
            weight_sq_sum=weight_sq_sum,
            grad_norm_sq_error=None if inner is None else grad_norm_sq_error(inner, weight_sq_sum or 1 / b),
        )
