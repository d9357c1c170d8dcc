"""`PerExample` at work: one measured step after the other, on one model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.comm import world_size
from adadagrad.core.errors import InvalidArgument, InvalidMeasurement
from adadagrad.core.records import GradientStatistics
from adadagrad.core.vectors import squared_norm
from adadagrad.statistics import coverage
from adadagrad.statistics.base import AbstractInstrument, Coefficients, Request
from adadagrad.statistics.coordinate import coordinate_variances, reduce_ratio
from adadagrad.statistics.examples import Examples
from adadagrad.statistics.layout import Layout
from adadagrad.statistics.planner import LayerSize, StepSize, measured_seconds, plain_seconds
from adadagrad.statistics.recorder import Recorder
from adadagrad.statistics.sums import WeightedSums
from adadagrad.statistics.taps import patched_forwards


@dataclass(slots=True)
class _Step:
    """What one measured step has gathered so far."""

    sums: WeightedSums = field(default_factory=WeightedSums)
    kept: list[tuple[Examples, Tensor]] = field(default_factory=list)  # with c_i, for inner products
    square_sums: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # sum c_i g_ij^2, float64
    group_norm_sq: float | None = None
    group: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # G, kept for coordinates of a part
    failure: Exception | None = None


class ExampleInstrument(AbstractInstrument):
    """`PerExample` at work on one model; see `AbstractInstrument` for the order of calls.

    Args:
        model: The model.
        request: The numbers wanted.
        calibrate: Whether to make trial runs before the first measurement.
    """

    def __init__(self, model: nn.Module, request: Request, calibrate: bool = True) -> None:
        coverage.refuse_batch_coupled(model)
        self.model, self.request, self.seconds = model, request, 0.0
        self.fallback: dict[str, nn.Parameter] = {}
        self._calibrate, self._verified = calibrate, False
        self._layout = Layout()
        self._step: _Step | None = None

    @contextmanager
    def micro_batch(self, num_examples: int | None = None, coefficients: Coefficients = None) -> Iterator[None]:
        """Measure the forward and backward inside; see `AbstractInstrument.micro_batch`."""
        started = time.perf_counter()
        coverage.refuse_batch_coupled(self.model)
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self._step is None:
            coverage.refuse_leftovers(parameters)
            self._step = _Step()
        recorder = Recorder(
            self.model,
            self._layout,
            num_examples,
            set(self.fallback.values()),
            keep_all=not self._verified or self.request.inner_products or self.request.coordinates is not None,
            watch_model=not self._verified or bool(self.fallback),
            calibrate=self._calibrate,
        )
        marks = coverage.mark_gradients(parameters.values())
        forwards = recorder.forwards()
        self.seconds += time.perf_counter() - started
        try:
            with patched_forwards(forwards):
                yield
        except BaseException:
            self.discard()
            raise
        finally:
            recorder.close()
        started = time.perf_counter()
        with torch.no_grad():
            try:
                self._read(self._step, recorder, parameters, marks, coefficients)
            except Exception as error:  # the gradient is whole; only the measurement has failed
                self._step.failure = error
        self.seconds += time.perf_counter() - started + recorder.seconds

    def close_group(self) -> None:
        """Note the measured part's gradient before other micro-batches add to it."""
        if self._step is None or self._step.failure is not None:
            return
        if world_size() > 1:
            self._step.failure = InvalidMeasurement("a measured part of a step needs a single process in this version")
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
        """Return the modelled costs; see `AbstractInstrument.costs`. Before the trial runs both are 0."""
        layers = list(self._layout.sizes.values())
        plain = plain_seconds(layers, step, device)
        measured = measured_seconds(
            layers,
            step,
            device,
            inner_products=self.request.inner_products,
            coordinates=self.request.coordinates is not None,
        )
        return plain, measured + 2 * plain * step.measured_examples / step.examples * bool(self.fallback)

    def state_dict(self) -> dict[str, Any]:
        """Return the batch dimensions and sizes of all layer calls, and what the fallback counts."""
        return {
            "verified": self._verified,
            "calibrated": self._layout.calibrated,
            "fallback": list(self.fallback),
            "dims": [[name, index, *(dims or (-1, -1))] for (name, index), dims in self._layout.dims.items()],
            "sizes": [
                [name, index, size.weights, size.positions, size.activations]
                for (name, index), size in self._layout.sizes.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another instrument on the same model has learnt."""
        parameters = dict(self.model.named_parameters())
        if not set(state["fallback"]) <= parameters.keys():
            return
        self.fallback = {name: parameters[name] for name in state["fallback"]}
        self._verified = state["verified"]
        self._layout = Layout(calibrated=state["calibrated"])
        for name, index, x, y in state["dims"]:
            self._layout.dims[name, index] = None if x < 0 else (x, y)
        for name, index, *size in state["sizes"]:
            self._layout.sizes[name, index] = LayerSize(*size)

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        return {p: p.grad for p in self.model.parameters() if p.requires_grad and p.grad is not None}

    def _read(
        self,
        step: _Step,
        recorder: Recorder,
        parameters: dict[str, nn.Parameter],
        marks: coverage.GradientMarks,
        coefficients: Coefficients,
    ) -> None:
        """Turn what the taps delivered into sums over examples."""
        if recorder.failure is not None:
            raise recorder.failure
        if recorder.leaf is None:
            raise InvalidMeasurement("the model itself was not called inside the measurement; call model(...)")
        changed = coverage.changed_since(marks, parameters.values())
        self._cover(recorder, parameters, changed, first=not marks)
        examples = Examples(self.model, recorder, self.fallback)
        c = _weights(coefficients, examples.n, recorder.leaf.device)
        rows = c != 0
        if recorder.leaf.grad is None and not recorder.kept and not self.fallback:
            raise InvalidMeasurement("no backward ran inside the measurement")
        squares = examples.square_norms()
        if not marks:
            coverage.check_rerun(examples.rerun_sums, self.fallback)
        step.sums.add(c[rows], squares[rows] / c[rows].square())
        if self.request.coordinates is not None:
            for p, sums in examples.weighted_square_sums(torch.where(rows, c, torch.inf).rsqrt()):
                step.square_sums[p] = step.square_sums.get(p, 0) + sums
        if self.request.inner_products:
            step.kept.append((examples, c))

    def _cover(
        self, recorder: Recorder, parameters: dict[str, nn.Parameter], changed: set[nn.Parameter], *, first: bool
    ) -> None:
        """See that every gradient is counted; move what rules cannot count to the fallback."""
        uncounted = changed - (recorder.counted - recorder.shared) - set(self.fallback.values())
        if not self._verified and first:
            whole = {p: p.grad for p in changed - uncounted - set(self.fallback.values()) if p.grad is not None}
            uncounted |= coverage.miscounted(recorder.kept, whole)
            self._verified = True
        names = {name: p for name, p in parameters.items() if p in uncounted}
        if not names:
            return
        if not recorder.watch_model:
            self._verified = self._layout.calibrated = False
            raise InvalidMeasurement(f"{', '.join(names)} received a gradient on a path that was not seen before")
        self.fallback.update(names)
        warnings.warn(
            f"{', '.join(names)}: no rule counts this gradient, so the model is rerun example by example for it "
            "when it is measured: exact, but slower. MicroBatch() is an alternative",
            stacklevel=5,
        )

    def _statistics(
        self, step: _Step, num_examples: int | None, weight_sq_sum: float | None, scale: float
    ) -> GradientStatistics:
        gradients = self._gradients()
        s = float(squared_norm(list(gradients.values())))
        part = step.group_norm_sq is not None
        if self.request.inner_products:
            for examples, c in step.kept:
                rows = c != 0
                products = examples.inner_products(gradients)
                step.sums.products.append((c[rows], products[rows] / c[rows]))
        sums = (step.sums if part else step.sums.scaled(scale)).over_ranks()
        norm_sq = step.group_norm_sq if step.group_norm_sq is not None else s
        ratio = None
        if self.request.coordinates is not None:
            ratio = self._ratio(step, gradients, sums, 1.0 if part else scale)
        return GradientStatistics(
            num_examples=num_examples if num_examples is not None else sums.units,
            grad_norm_sq=s,
            variance_trace=sums.variance_trace(norm_sq),
            inner_product_variance=sums.inner_product_variance() if self.request.inner_products else None,
            coordinate_ratio=ratio,
            num_units=sums.units,
            kind="per_example",
            weight_sq_sum=weight_sq_sum if num_examples is not None else sums.weight_sq / sums.weight**2,
            variance_trace_error=sums.variance_trace_error(),
        )

    def _ratio(
        self, step: _Step, gradients: dict[nn.Parameter, Tensor], sums: WeightedSums, scale: float
    ) -> float | None:
        assert self.request.coordinates is not None
        group = step.group or gradients
        order = [p for p in gradients if p in step.square_sums or p in group]
        square_sums = [scale * step.square_sums.get(p, torch.zeros_like(p, dtype=torch.float64)) for p in order]
        variances = coordinate_variances(square_sums, [group.get(p, torch.zeros_like(p)) for p in order], sums)
        moment = self.request.second_moment
        moments = None if moment is None else [moment(p) for p in order]
        return reduce_ratio(variances, [gradients[p] for p in order], self.request.coordinates, moments)


def _weights(value: Coefficients, n: int, device: torch.device) -> Tensor:
    """Return c_i as float64 (n,)."""
    if callable(value):
        value = value()
    if value is None or isinstance(value, int | float):
        return torch.full((n,), 1 / n if value is None else float(value), dtype=torch.float64, device=device)
    weights = torch.as_tensor(value, dtype=torch.float64, device=device).detach().flatten()
    if len(weights) != n:
        raise InvalidArgument(f"coefficients must hold one weight for each of the {n} examples, got {len(weights)}")
    return weights
