"""`MicroBatch` at work: the gradients of whole micro-batches, taken in before they are added up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument, InvalidMeasurement, StepError
from adadagrad.core.records import GradientStatistics
from adadagrad.statistics.base import AbstractInstrument, Coefficients, Request
from adadagrad.statistics.compiled import how_it_runs
from adadagrad.statistics.coverage import refuse_leftovers
from adadagrad.statistics.layer_costs import RATES, LayerSize
from adadagrad.statistics.planner import StepSize, plain_seconds
from adadagrad.statistics.unit_step import UnitStep


class UnitInstrument(AbstractInstrument):
    """`MicroBatch` at work on one model; see `AbstractInstrument` for the order of calls.

    Args:
        model: The model.
        request: The numbers wanted.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model, self.request, self.seconds = model, request, 0.0
        self._step: UnitStep | None = None
        self._inside = False

    @property
    def failure(self) -> Exception | None:
        """Why the step in progress will have no statistics; see `AbstractInstrument.failure`."""
        return None if self._step is None else self._step.part.failure

    @property
    def compiled(self) -> str:
        """How a compiled model runs; see `AbstractInstrument.compiled`."""
        return how_it_runs(self.model, "compiled")

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
            self._step = UnitStep()
        step, self._inside = self._step, True
        sharded = self.request.gradient == "sharded"
        before = {p: gradient.clone() for p, gradient in self._gradients().items()} if sharded else {}
        gradients: dict[nn.Parameter, Tensor] = {}
        twice: set[nn.Parameter] = set()
        hooks = [
            p.register_hook(partial(_receive, gradients, twice, p))  # type: ignore[no-untyped-call]
            for p in (() if sharded else parameters.values())
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
        with step.part.protect():
            if sharded:  # a unit is what all ranks have reduced together
                gradients = {p: g - before[p] if p in before else g for p, g in self._gradients().items()}
            _refuse_unusual(gradients, twice)
            weight = total_weight(coefficients, num_examples)
            step.add(gradients, self._gradients(), num_examples if weight > 0 else 0, weight, self.request)
        self.seconds += time.perf_counter() - started

    def close_group(self) -> None:
        """Note the measured part's gradient before other micro-batches add to it."""
        if self._step is not None and self._step.part.failure is None:
            self._step.part.close(self._gradients(), copy=self.request.coordinates is not None)

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
        if step.part.failure is not None:
            raise step.part.failure
        with torch.no_grad():
            statistics = step.statistics(self._gradients(), self.request, num_examples, weight_sq_sum, scale)
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
        return plain_seconds(layers, step, device), read * 2 * step.measured_micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is nothing to learn about the model."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        return {p: p.grad for p in self.model.parameters() if p.requires_grad and p.grad is not None}


def _receive(
    gradients: dict[nn.Parameter, Tensor], twice: set[nn.Parameter], p: nn.Parameter, gradient: Tensor | None
) -> None:
    """Take in a parameter's gradient of this backward, before it is added to `.grad`."""
    if gradient is None:  # behind DistributedDataParallel, of an output that the loss leaves out
        return
    if p in gradients:
        twice.add(p)
    gradients[p] = gradient.detach()


def _refuse_unusual(gradients: dict[nn.Parameter, Tensor], twice: set[nn.Parameter]) -> None:
    """Refuse a micro-batch without its one backward."""
    if twice or not gradients:
        reason = "several backward passes ran" if twice else "no backward ran"
        raise InvalidMeasurement(f"{reason} in one measured micro-batch: run one, on the added losses")


def total_weight(coefficients: Coefficients, n: int) -> float:
    """Return C_k = sum c_i.

    Args:
        coefficients: c_i, in any of their forms.
        n: Number of examples.
    """
    if callable(coefficients):
        coefficients = coefficients()
    if coefficients is None:
        return 1.0
    if isinstance(coefficients, int | float):
        return n * float(coefficients)
    return float(torch.as_tensor(coefficients, dtype=torch.float64).sum())
