"""`PerExample` and `Probe` at work: one measured step after the other, on one model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument, InvalidMeasurement, UncoveredParameter
from adadagrad.core.records import GradientStatistics
from adadagrad.statistics import coverage
from adadagrad.statistics.accounting import Accounting
from adadagrad.statistics.base import AbstractInstrument, Coefficients, Request
from adadagrad.statistics.broadcast import CallKey
from adadagrad.statistics.compiled import how_it_runs, uncompiled
from adadagrad.statistics.example_step import ExampleStep, example_weights
from adadagrad.statistics.examples import Examples
from adadagrad.statistics.layer_costs import LayerSize, NormsBy
from adadagrad.statistics.layout import Layout
from adadagrad.statistics.local_gradients import LocalGradients, watched
from adadagrad.statistics.measured_part import over_ranks
from adadagrad.statistics.planner import StepSize, measured_seconds, plain_seconds
from adadagrad.statistics.projections import Projections
from adadagrad.statistics.recorder import Recorder
from adadagrad.statistics.sketching import Sketching
from adadagrad.statistics.small_noise import is_coarse, is_small
from adadagrad.statistics.survey import Survey
from adadagrad.statistics.taps import patched_forwards


class ExampleInstrument(AbstractInstrument):
    """`PerExample` or `Probe` at work on one model; see `AbstractInstrument` for the order of calls.

    The steps that verify (see `Accounting`) make trial runs too.

    Args:
        model: The model.
        request: The numbers wanted.
        calibrate: Whether to make trial runs before the first measurement.
        fuse: Whether weight gradients may be formed example by example.
        sketching: How norms are sketched where exact ones cost a product; None for exact norms everywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        request: Request,
        calibrate: bool = True,
        fuse: bool = True,
        sketching: Sketching | None = None,
    ) -> None:
        refuse_sharded(request, sketched=sketching is not None)
        coverage.refuse_batch_coupled(Survey.of(model).coupled)
        self.model, self.request, self.seconds = model, request, 0.0
        self._calibrate, self._fuse, self._sketching = calibrate, fuse, sketching
        self._layout = Layout()
        self._accounting = Accounting()
        self._step: ExampleStep | None = None
        self._parameters: dict[str, nn.Parameter] = {}  # of the latest micro-batch
        self._priced: tuple[object, object, tuple[float, float]] | None = None  # the latest costs, and of what
        self._small_noise = False  # at the last measured step, so that the next one keeps what float64 needs

    @property
    def fallback(self) -> dict[str, nn.Parameter]:
        """Parameters that the model is rerun for, by qualified name."""
        return self._accounting.fallback

    @property
    def failure(self) -> Exception | None:
        """Why the step in progress will have no statistics; see `AbstractInstrument.failure`."""
        return None if self._step is None else self._step.part.failure

    @property
    def compiled(self) -> str:
        """How a compiled model runs; see `AbstractInstrument.compiled`."""
        return how_it_runs(self.model, "uncompiled")

    @property
    def layout(self) -> Layout:
        """Where the examples are, as far as it is known."""
        return self._layout

    @property
    def sizes(self) -> Mapping[CallKey, LayerSize]:
        """Sizes of all layer calls, by name and call number; empty before the trial runs."""
        return self._layout.sizes

    @property
    def norms_by(self) -> NormsBy:
        """How norms are come by, and what else is measured."""
        return NormsBy(
            fuse=self._fuse,
            probes=0 if self._sketching is None else self._sketching.probes,
            inner_products=self.request.inner_products,
            coordinates=self.request.coordinates is not None,
        )

    @contextmanager
    def micro_batch(self, num_examples: int | None = None, coefficients: Coefficients = None) -> Iterator[None]:
        """Measure the forward and backward inside; see `AbstractInstrument.micro_batch`."""
        started = time.perf_counter()
        survey = Survey.of(self.model)
        coverage.refuse_batch_coupled(survey.coupled)
        parameters = survey.parameters
        first = self._step is None
        if first:
            coverage.refuse_leftovers(parameters)
        verify = first and self._accounting.due
        self._layout.calibrated &= not verify
        keep = self.request.inner_products or self.request.coordinates is not None
        step = ExampleStep() if self._step is None else self._step
        if self._sketching is None:
            keep |= self._small_noise if first else bool(step.totals)
        else:
            if step.sketches is None:
                step.sketches = self._sketching.start(self._accounting.measured, self.request.ranks)
            survey = self._sketching.replaced(survey, step.sketches)
        recorder = Recorder(
            self.model,
            survey,
            self._layout,
            num_examples,
            set(self.fallback.values()),
            keep=keep,
            square=self.request.coordinates is not None,
            verify=verify,
            fuse=self._fuse and not verify,
            watch_model=verify or bool(self.fallback),
            calibrate=self._calibrate,
            trials=self._agreed_trials(num_examples),
        )
        self._parameters = parameters
        marks = {} if first else coverage.mark_gradients(parameters.values())
        local = self._watch(parameters, everything=verify)
        with uncompiled(survey.compiled):
            forwards = recorder.forwards()
            self._step = step
            before: dict[str, Tensor | None] = {}
            if self.fallback and not first:
                with step.part.protect():
                    before = {name: None if p.grad is None else p.grad.clone() for name, p in self.fallback.items()}
            self.seconds += time.perf_counter() - started
            try:
                with patched_forwards(forwards), recorder.entrance, self._watching(local):
                    yield
            except BaseException:
                self.discard()
                raise
            finally:
                recorder.close()
        started = time.perf_counter()
        with step.part.protect():
            recorder.gather()
            changed = coverage.changed_since(marks, parameters.values()) if local is None else local.received
            found = local.kept if isinstance(local, LocalGradients) else self._gradients()
            recorder.check(changed)
            counted = recorder.intake.counted - recorder.shared
            kept = recorder.intake.kept

            def miscounted(judged: set[nn.Parameter]) -> set[nn.Parameter]:
                if isinstance(local, Projections):
                    return local.miscounted(kept, judged)
                return coverage.miscounted(kept, {p: found[p] for p in judged if p in found})

            self._accounting.cover(parameters, changed, counted, miscounted, verify=verify)
            if self._sharded:
                self._refuse_fallback()
            self._read(
                step,
                recorder,
                before,
                found,
                coefficients,
                first=first and (keep or verify) and self._sketching is None and not self._sharded,
            )
        if first:
            self._accounting.count_step()
        if step.part.failure is not None:
            self._accounting.doubt()
        self.seconds += time.perf_counter() - started + recorder.intake.seconds

    def close_group(self) -> None:
        """Note the measured part's gradient before other micro-batches add to it."""
        if self._step is None or (self._step.part.failure is not None and not self._sharded):
            return
        part = self._step.part
        norm = None if self._step.sketches is None else self._step.sketches.close
        if self._sharded:  # the mean over ranks of what each has weighed for itself
            norm = partial(over_ranks, self.request.ranks.count)
        part.close(self._gradients(), copy=self.request.coordinates is not None, norm=norm)

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
            try:
                statistics = step.statistics(self._gradients(), self.request, num_examples, weight_sq_sum, scale)
            except InvalidMeasurement:
                self._accounting.doubt()
                raise
        alone = self.request.ranks.count == 1 and not self._sharded
        small = alone and is_small(statistics.variance_trace, statistics.grad_norm_sq)
        self._small_noise = small and is_coarse(self._gradients().values())
        self.seconds += time.perf_counter() - started
        return statistics

    def discard(self) -> None:
        """Forget the step in progress."""
        self._step = None

    def costs(self, step: StepSize, device: str) -> tuple[float, float]:
        """Return the modelled costs; see `AbstractInstrument.costs`. Before the trial runs no layer is known."""
        asked = (step, device, bool(self.fallback))
        if self._priced is None or self._priced[0] != asked or self._priced[1] is not self.sizes:
            layers = list(self.sizes.values())
            plain, added = plain_seconds(layers, step, device), measured_seconds(layers, step, device, self.norms_by)
            added += 2 * plain * step.measured_examples / step.examples * bool(self.fallback)
            self._priced = (asked, self.sizes, (plain, added))
        return self._priced[2]

    def state_dict(self) -> dict[str, Any]:
        """Return the batch dimensions and sizes of all layer calls, and what the fallback counts."""
        learnt = {**self._accounting.state_dict(self.model), **self._layout.state_dict()}
        return {**learnt, "small_noise": self._small_noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another instrument on the same model has learnt."""
        accounting = Accounting.of(state, self.model)
        if accounting is not None:
            self._accounting, self._layout = accounting, Layout.of(state)
            self._small_noise = state.get("small_noise", False)

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        return {p: p.grad for p in self._parameters.values() if p.grad is not None}

    @property
    def _sharded(self) -> bool:
        return self.request.gradient == "sharded"

    def _agreed_trials(self, num_examples: int | None) -> bool | None:
        """Return whether any rank needs trial runs, where a forward needs all ranks; None elsewhere."""
        if not self._sharded:
            return None
        due = self._calibrate and self._layout.due(num_examples or 1)
        return self.request.ranks.sum(float(due))[0] > 0

    def _refuse_fallback(self) -> None:
        """Refuse to rerun a model whose parameters are not here."""
        if self.fallback:
            names = ", ".join(self.fallback)
            self.fallback.clear()
            raise UncoveredParameter(
                f"{names}: no rule counts this gradient, and a model that fully_shard has sharded cannot be rerun "
                "example by example; use estimator=MicroBatch()"
            )

    def _watch(
        self, parameters: Mapping[str, nn.Parameter], *, everything: bool
    ) -> LocalGradients | Projections | None:
        """Return what takes note of this rank's own gradients, where `.grad` may hold those of all ranks afterwards."""
        if self._sharded:
            return Projections(parameters, self._accounting.measured, verify=everything)
        if self.request.ranks.count == 1 or self.request.gradient != "shared":
            return None
        return LocalGradients(parameters.values() if everything else self.fallback.values())

    def _watching(self, local: LocalGradients | Projections | None) -> AbstractContextManager[None]:
        if local is None:
            return nullcontext()
        watch = self.request.watch
        return watched(self._parameters.values(), local) if watch is None else watch(local)

    def _read(
        self,
        step: ExampleStep,
        recorder: Recorder,
        before: dict[str, Tensor | None],
        found: Mapping[nn.Parameter, Tensor],
        coefficients: Coefficients,
        *,
        first: bool,
    ) -> None:
        """Turn what the taps delivered into sums over examples."""
        assert recorder.leaf is not None
        examples = Examples(self.model, recorder, self.fallback)
        weights = example_weights(coefficients, examples.n, recorder.leaf.device)
        step.add(examples, weights, self.request, found if first else None, self._small_noise)
        if self.fallback:
            expected = {name: _added(found.get(p), before.get(name)) for name, p in self.fallback.items()}
            coverage.check_rerun(examples.rerun_sums, expected, list(found.values()), examples.types)
            self._accounting.announce(stacklevel=5)


def refuse_sharded(request: Request, *, sketched: bool) -> None:
    """Refuse to measure what takes whole gradients of single examples or of the step, where no rank has them.

    Args:
        request: The numbers wanted, and how gradients lie on ranks.
        sketched: Whether norms are to be sketched.

    Raises:
        InvalidArgument: The model is sharded, and the request is for more than norms, or for sketches.
    """
    if request.gradient != "sharded":
        return
    if request.inner_products:
        raise InvalidArgument(
            "inner products with the gradient cannot be measured example by example where fully_shard leaves each rank "
            "a shard of it: use estimator=MicroBatch(), or wrap the model in DistributedDataParallel"
        )
    if request.coordinates is not None:
        raise InvalidArgument(
            "the coordinate-wise test needs whole gradients, and fully_shard leaves shards: use NormTest(), or wrap "
            "the model in DistributedDataParallel"
        )
    if sketched:
        raise InvalidArgument(
            "estimator Probe() needs whole gradients, and fully_shard leaves shards: use PerExample()"
        )


def _added(after: Tensor | None, before: Tensor | None) -> Tensor | None:
    """Return what a backward has added to a gradient."""
    return after if after is None or before is None else after - before
