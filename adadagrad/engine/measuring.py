"""Which steps are measured, and by which estimator."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

import torch

from adadagrad.core.errors import BatchCoupledModule, InvalidArgument, UncoveredParameter
from adadagrad.core.optimizing import Extrapolating
from adadagrad.core.protocols import BatchSizePolicy, LearningRateRule
from adadagrad.core.records import GradientStatistics
from adadagrad.core.settings import Measure
from adadagrad.engine.averaging import Averaging
from adadagrad.engine.failure import Failure
from adadagrad.engine.local_noise import for_local_steps
from adadagrad.engine.second_moments import SecondMoments
from adadagrad.engine.splitting import Share, Split, measured_split, plain_split, smallest_batch
from adadagrad.parallel import AbstractParallel
from adadagrad.statistics import MicroBatch, PerExample, Probe, Worker, choose_estimator
from adadagrad.statistics.base import AbstractEstimator, AbstractInstrument, Request, check_estimator
from adadagrad.statistics.choosing import reconsidered
from adadagrad.statistics.coverage import batch_coupled_module
from adadagrad.statistics.example_instrument import ExampleInstrument
from adadagrad.statistics.explain import explain
from adadagrad.statistics.planner import MeasureBudget, StepSize
from adadagrad.statistics.smoothing import ExponentialAverage
from adadagrad.statistics.within_ranks import open_within


class Measuring:
    """Plans measurements, and replaces the estimator where ``"auto"`` turns out not to fit the model.

    Args:
        parallel: How a step runs, and on what module.
        optimizer: Its optimizer, for second moments.
        policy: The policy, for what it needs.
        rate: The learning-rate rule, for the same; None for none.
        dataset_size: N, the length of an epoch.
        measure: The user's settings; None measures what the policy needs, with the defaults.
        errors: Whether the policy's request must have a standard error: inner products give that of |g|^2.
    """

    def __init__(
        self,
        parallel: AbstractParallel,
        optimizer: torch.optim.Optimizer,
        policy: BatchSizePolicy,
        measure: Measure | None,
        *,
        rate: LearningRateRule | None = None,
        dataset_size: int = 1,
        errors: bool = False,
    ) -> None:
        model = parallel.module
        self._ranks = parallel.ranks
        self._whole = parallel.whole
        self._apart = parallel.gradient == "local" and parallel.ranks.count > 1
        self.rate_needs = rate is not None and bool(rate.needs)
        self.settings = Measure() if measure is None else measure
        self.enabled = bool(policy.needs) or self.rate_needs or measure is not None
        self._model, self._needed = model, bool(policy.needs) or self.rate_needs
        self._errors, self._displaced = errors and bool(policy.needs), isinstance(optimizer, Extrapolating)
        self._second_moments = SecondMoments(optimizer, policy.coordinate_reduction)
        self._request = Request(
            inner_products="inner_product_variance" in policy.needs
            or (self._errors and "grad_norm_sq" in policy.needs),
            coordinates=policy.coordinate_reduction,
            second_moment=self._second_moments.of,
            ranks=parallel.ranks,
            gradient="shared" if parallel.gradient == "local" and not self._apart else parallel.gradient,
            watch=parallel.watch,
        )
        self._device = next((p.device.type for p in model.parameters()), "cpu")
        given, averaging = unwrapped(self.settings.estimator, policy)
        if self._apart:
            given = for_local_steps(parallel, given, policy, rate, errors=self._errors)
            self.enabled &= not parallel.shows_noise
        self.averaging = Averaging(averaging, dataset_size)
        self._automatic = given is None
        self._considered: tuple[StepSize, object] | None = None  # sizes of step and layers at the latest choice
        self.budget = MeasureBudget(self.settings.max_overhead)
        self._credit = self.budget.credit  # before the step in progress
        self._settled: tuple[int, bool, float | None] | None = None  # a round, whether it is measured, the credit after
        self.estimator: AbstractEstimator = choose_estimator(model) if given is None else given
        self.instrument: AbstractInstrument = self._open(self.estimator)

    @property
    def smallest_batch(self) -> int:
        """Fewest examples that a step needs for the estimator to say anything, or how sure it is."""
        return self._smallest(self.estimator)

    def refuse_small(self, global_batch_size: int, estimator: AbstractEstimator | None = None) -> None:
        """Refuse a batch on which the policy could never be given a measurement.

        Args:
            global_batch_size: Its examples.
            estimator: What would measure it; None is the present estimator.

        Raises:
            InvalidArgument: The policy needs statistics and the estimator needs more examples.
        """
        estimator = self.estimator if estimator is None else estimator
        smallest = self._smallest(estimator)
        if self._needed and global_batch_size < smallest:
            raise InvalidArgument(
                f"global_batch_size must be >= {smallest} for {estimator!r} to measure any noise"
                f"{' with its error' if self._errors else ''}, got {global_batch_size}"
            )

    def refuse_large(self, max_batch_size: int, micro_batch_size: int) -> None:
        """Refuse a cap under which the estimator could not measure any more.

        Args:
            max_batch_size: The largest batch, over all ranks.
            micro_batch_size: Most examples in one forward.

        Raises:
            InvalidArgument: `Worker` measures a sharded model, which takes one micro-batch a rank.
        """
        most = micro_batch_size * self._ranks.count
        if self._request.gradient == "sharded" and isinstance(self.estimator, Worker) and max_batch_size > most:
            raise InvalidArgument(
                f"max_batch_size must be <= {most} for Worker() to measure a sharded model, one micro-batch a rank, "
                f"got {max_batch_size}: lower it, raise micro_batch_size, or use MicroBatch()"
            )

    def split(self, number: int, share: Share, micro_batch_size: int, *, wanted: bool) -> Split:
        """Return the split of a step, and whether it is measured.

        Args:
            number: The step's number, from 1.
            share: Its examples.
            micro_batch_size: Most examples in one forward.
            wanted: Whether a measurement could change anything.

        Returns:
            The split.
        """
        self._credit = self.budget.credit
        self.averaging.begin()
        plain = plain_split(self.estimator, share, micro_batch_size)
        if not (self.enabled and wanted and share.size >= self.smallest_batch):
            return plain
        measured = measured_split(self.estimator, self._most, share, micro_batch_size)
        every = self.settings.every
        sizes = _sizes(plain, measured)
        if self._automatic and self._request.gradient != "sharded":  # where norms cannot be sketched
            self._reconsider(sizes)
        if every == "auto":
            due = self._due(number, sizes)
        else:
            due = (number - 1) % every == 0
        if due and self._automatic and not isinstance(self.estimator, MicroBatch):
            coupled = batch_coupled_module(self._model)
            if coupled is not None:  # put into training mode since the estimator was chosen
                warnings.warn(f"measuring with MicroBatch() from now on, because of {coupled}", stacklevel=4)
                self._replace_by_micro_batches(share.size)
                return plain
        return measured if due else plain

    @property
    def failure(self) -> Failure:
        """How the measurement of the step in progress has failed on this rank."""
        return Failure.of(self.instrument.failure)

    def finish(
        self, num_examples: int, weight_sq_sum: float | None, scale: float, failure: Failure = Failure.NONE
    ) -> tuple[GradientStatistics | None, str]:
        """Return the step's statistics, or why there are none.

        Args:
            num_examples: Examples averaged into the gradient.
            weight_sq_sum: Sum of their squared weights, None for equal weights.
            scale: Factor by which the gradients were corrected after the backward.
            failure: How it has failed, here or on another rank: the worst.

        Returns:
            The statistics and ``""``, or None and the reason.

        Raises:
            UncoveredParameter: The chosen estimator cannot count a parameter.
            BatchCoupledModule: The chosen estimator cannot measure a model that mixes examples.
            InvalidArgument: The batch is too small for the estimator that replaces ``"auto"``'s first choice.
        """
        try:
            if failure > Failure.NONE:  # as all ranks know: none may ask the others for numbers
                own = self.instrument.failure if failure == self.failure else None
                self.instrument.discard()
                raise failure.elsewhere() if own is None else own
            return self._marked(self.instrument.finish(num_examples, weight_sq_sum, scale)), ""
        except (UncoveredParameter, BatchCoupledModule) as error:
            if not self._automatic:
                raise
            warnings.warn(f"measuring with MicroBatch() from now on, because {error}", stacklevel=4)
            self._replace_by_micro_batches(num_examples)
            return None, "estimator replaced"
        except Exception as error:  # whatever it is, the gradient is whole
            warnings.warn(f"a measurement failed, the step is not affected: {error}", stacklevel=4)
            return None, "measurement failed"

    def combine(self, statistics: GradientStatistics) -> tuple[GradientStatistics | None, str]:
        """Return what the policy reads of a measured step, or why there is nothing yet; before clipping.

        Args:
            statistics: The step's own.

        Returns:
            The same, or combined with those of steps before, and ``""``; or None and a reason.
        """
        parameters = self._model.parameters()  # frozen ones too: they may be freed later
        combined, reason = self.averaging.combine(statistics, parameters)
        return None if combined is None else self._marked(combined), reason

    def explain(self, share: Share, micro_batch_size: int) -> str:
        """Return what is measured how, and what it is expected to cost; see `AdaptiveBatch.explain`.

        Args:
            share: Examples of a step.
            micro_batch_size: Most examples in one forward.
        """
        if not self.enabled or share.size < self.smallest_batch:
            return "nothing is measured: the policy needs no statistics, or the batch is too small"
        every, overhead = self.settings.every, self.settings.max_overhead
        sizes = _sizes(
            plain_split(self.estimator, share, micro_batch_size),
            measured_split(self.estimator, self._most, share, micro_batch_size),
        )
        if every == "auto":
            return explain(self.estimator, self.instrument, sizes, self._device, max_overhead=overhead)
        return explain(self.estimator, self.instrument, sizes, self._device, every=every)

    def _marked(self, statistics: GradientStatistics) -> GradientStatistics:
        """Say of statistics where they were taken."""
        return replace(statistics, displaced=True) if self._displaced else statistics

    @property
    def _most(self) -> int | None:
        """Most examples measured of a step; all, where parts cannot be pooled over ranks by scalars."""
        alone = self._ranks.count == 1 or (isinstance(self.estimator, PerExample) and not self._request.coordinates)
        return self.settings.max_examples if alone else None

    def _due(self, number: int, sizes: StepSize) -> bool:
        """Return whether the budget allows a measurement; a rank that repeats a local step alone asks nobody again."""
        if self._apart and self._settled is not None and self._settled[0] == number:
            _, due, self.budget.credit = self._settled
            return due
        due = self.budget.due(*self._costs(sizes))
        self._settled = (number, due, self.budget.credit)
        return due

    def _costs(self, sizes: StepSize) -> tuple[float, float]:
        """Return the modelled costs of a step as rank 0 sees them, and measure as it does: layer sizes may differ."""
        costs = self.instrument.costs(sizes, self._device)
        if self._ranks.count == 1:
            return costs
        kinds = (PerExample(), Probe(), MicroBatch())
        own = kinds.index(self.estimator) if self._automatic and self.estimator in kinds else len(kinds)
        plain, measured, kind = self._ranks.first(*costs, float(own))
        if int(kind) != own:
            self._replace(kinds[int(kind)])
        return plain, measured

    def _reconsider(self, sizes: StepSize) -> None:
        """Let ``"auto"`` choose again where the sizes of the step or of the layers are others than the last time."""
        layers = self.instrument.sizes if isinstance(self.instrument, ExampleInstrument) else None
        if self._considered is None or self._considered[0] != sizes or self._considered[1] is not layers:
            self.estimator, self.instrument = reconsidered(self.estimator, self.instrument, sizes, self._device)
            layers = self.instrument.sizes if isinstance(self.instrument, ExampleInstrument) else None
            self._considered = (sizes, layers)

    def undo(self) -> None:
        """Forget the step in progress, and what its measurement cost or taught, as if it had not been begun."""
        self.instrument.discard()
        self.averaging.undo()
        self.budget.credit = self._credit
        if self._credit is None and self.settings.every == "auto":  # the first step of all: its trial runs set costs
            self._replace(self.estimator)

    def check_second_moments(self) -> None:
        """Refuse the weighted reduction once an applied step has left no second moment.

        Raises:
            InvalidArgument: The optimizer keeps none.
        """
        self._second_moments.check(self._model.parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to measure the same steps in the same way."""
        return {
            "estimator": repr(self.estimator),
            "credit": self.budget.credit,
            "instrument": self.instrument.state_dict(),
            "averaging": self.averaging.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of another run on the same model.

        Args:
            state: What `state_dict` returned.
        """
        if self._automatic and state["estimator"] != repr(self.estimator):
            for other in (MicroBatch(), Probe(), PerExample()):
                if state["estimator"] == repr(other):
                    self._replace(other)
        self.budget.credit, self._settled = state["credit"], None
        if "averaging" in state:  # which a version without averages did not save
            self.averaging.load_state_dict(state["averaging"])
        if state["estimator"] == repr(self.estimator):
            self.instrument.load_state_dict(state["instrument"])

    def _replace_by_micro_batches(self, size: int) -> None:
        """Go over to `MicroBatch`, unless a batch of this size would then never be measured again."""
        self.refuse_small(size, MicroBatch())
        self._replace(MicroBatch())

    def _replace(self, estimator: AbstractEstimator) -> None:
        seconds = self.instrument.seconds
        self.estimator, self.instrument = estimator, self._open(estimator)
        self.instrument.seconds = seconds  # of the whole run

    def _smallest(self, estimator: AbstractEstimator) -> int:
        apart = self._apart or (self._request.gradient == "sharded" and isinstance(estimator, MicroBatch))
        return smallest_batch(estimator, errors=self._errors, ranks=self._ranks.count, apart=apart, whole=self._whole)

    def _open(self, estimator: AbstractEstimator) -> AbstractInstrument:
        if self._apart and not isinstance(estimator, Worker):
            return open_within(estimator, self._model, self._request)
        return estimator.open(self._model, self._request)


def unwrapped(
    estimator: object, policy: BatchSizePolicy
) -> tuple[AbstractEstimator | None, float | Literal["epoch"] | None]:
    """Take an estimator out of the average that a user has put around it.

    Args:
        estimator: An estimator or ``"auto"``.
        policy: Says what to average where the user says nothing.

    Returns:
        The estimator inside, None for ``"auto"``; and what to combine statistics over.

    Raises:
        InvalidArgument: It is neither, an average of an average, or the policy wants an epoch and the user an average.
    """
    given, averaging = check_estimator(estimator), policy.averaging
    if not isinstance(given, ExponentialAverage):
        return given, averaging
    if averaging == "epoch":
        raise InvalidArgument(f"{policy!r} reads the sums of an epoch, not an average: give it another estimator")
    if isinstance(given.estimator, ExponentialAverage):
        raise InvalidArgument(f"estimator must average once, got {given!r}: give one decay")
    return check_estimator(given.estimator), given.decay


def _sizes(plain: Split, measured: Split) -> StepSize:
    """Return the sizes of a measured step for the cost model, beside one that is not measured."""
    part, extra = sum(measured.sizes[: measured.measured]), len(measured.sizes) - len(plain.sizes)
    return StepSize(sum(plain.sizes), len(plain.sizes), part, measured.measured, extra)
