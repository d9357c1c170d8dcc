"""`GradientMeter`: measure in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from torch import nn

from adadagrad.core.checks import check_integer, check_positive
from adadagrad.core.errors import InvalidArgument, StepError
from adadagrad.core.records import GradientStatistics
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics.base import AbstractEstimator, Coefficients, Request, check_estimator
from adadagrad.statistics.choosing import choose_estimator, reconsidered
from adadagrad.statistics.explain import explain
from adadagrad.statistics.planner import StepSize


class GradientMeter:
    """Measure the gradient's noise inside the forward and backward that a loop runs anyway.

    ``with meter:`` around the forward and backward of one whole batch under a mean-reduced loss; then
    `statistics`, before clipping and before `zero_grad`. For accumulation over several micro-batches use
    `micro_batch` with the weights. The gradients in `.grad` stay what they are, up to rounding where `PerExample` forms
    them example by example (``PerExample(fuse=False)`` keeps every bit), and nothing stays on the model.

    The rows of the model's first tensor argument are the examples. Inside the model they may lie in any dimension, but
    a model that is itself given (positions, examples, ...) is refused where it mixes positions, and where it does not,
    every position counts as an example: give it (examples, positions, ...) and let it transpose.

    Args:
        model: The module whose trainable parameters are measured.
        estimator: `PerExample`, `Probe`, `MicroBatch`, an `ExponentialAverage` over steps of one of them, or
            ``"auto"``, which is reconsidered before every step with the number of examples of the last one
            (`choosing.py`).
        inner_products: Also measure the inner-product variance, for the inner product tests.
        coordinates: Also measure the coordinate ratio under this reduction; ``"weighted"`` needs an optimizer, and so
            `AdaptiveBatch`.

    Raises:
        InvalidArgument: `model` is no module, `estimator` neither an estimator nor ``"auto"``, or `coordinates` cannot
            be measured.
        BatchCoupledModule: `PerExample` on a model with batch normalisation in training mode.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 1)
        >>> meter = GradientMeter(model)
        >>> with meter:
        ...     model(torch.eye(3)).mean().backward()
        >>> round(meter.statistics().variance_trace, 6)
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: AbstractEstimator | str = "auto",
        *,
        inner_products: bool = False,
        coordinates: CoordinateReduction | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidArgument(f"model must be a torch.nn.Module, got {type(model).__name__}")
        _check_coordinates(coordinates)
        given = check_estimator(estimator)
        self._automatic = given is None
        self._estimator = choose_estimator(model) if given is None else given.settled(model)
        self._instrument = self._estimator.open(model, Request(inner_products=inner_products, coordinates=coordinates))
        self._last: StepSize | None = None
        self._micro_batches = 0
        self._device = next((p.device.type for p in model.parameters()), "cpu")
        self._context: AbstractContextManager[None] | None = None
        self._open = False

    @property
    def compiled(self) -> str:
        """Which micro-batches of a compiled model run its compiled code, in one line; empty if nothing is compiled."""
        return self._instrument.compiled

    def __enter__(self) -> GradientMeter:
        if self._open:
            raise StepError(
                "the meter holds a measurement that was not read: call meter.statistics() before the next one, or "
                "use meter.micro_batch(...) to accumulate several micro-batches"
            )
        context = self.micro_batch()
        context.__enter__()
        self._context = context
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._context is not None
        context, self._context = self._context, None
        context.__exit__(kind, error, trace)

    @contextmanager
    def micro_batch(self, num_examples: int | None = None, coefficients: Coefficients = None) -> Iterator[None]:
        """Measure one micro-batch of an accumulated step; an error inside forgets the whole step.

        Args:
            num_examples: n, rows of the micro-batch, >= 1; None reads it off the model's first tensor argument.
            coefficients: c_i, the weight of each example in the accumulated gradient: 1 / b where the loss is
                a mean over b examples in total. None means 1 / n.

        Yields:
            Nothing; forward and backward belong inside.

        Raises:
            InvalidArgument: `num_examples` is no integer >= 1.
            LeftoverGradients: On entering the first one, where a gradient from before is still there.
            StepError: The model is being measured already.
        """
        if num_examples is not None:
            check_integer(1, num_examples=num_examples)
        if not self._open:
            self._begin()
        with self._instrument.micro_batch(num_examples, coefficients):
            self._open, self._micro_batches = True, self._micro_batches + 1
            try:
                yield
            except BaseException:
                self._open = False
                raise

    def statistics(self, num_examples: int | None = None, scale: float = 1.0) -> GradientStatistics:
        """Return the statistics of everything measured since the last call.

        With a gradient scaler: ``meter.micro_batch(coefficients=scaler.get_scale() / b)`` around the scaled loss's
        backward, then ``scaler.unscale_(optimizer)`` and ``meter.statistics(scale=1 / scaler.get_scale())``.

        Args:
            num_examples: b, examples averaged into `.grad`, >= 1; None means the measured ones.
            scale: Factor by which `.grad` has been multiplied since the backward, > 0; dimensionless.

        Returns:
            The four numbers; V is NaN where fewer than two units were measured.

        Raises:
            InvalidArgument: `num_examples` or `scale` is out of range; the measurement can still be read.
            InvalidMeasurement: Nothing was measured, or the measurement failed.
        """
        check_positive(scale=scale)
        if num_examples is not None:
            check_integer(1, num_examples=num_examples)
        self._open = False
        statistics = self._instrument.finish(num_examples, scale=scale)
        n = statistics.num_examples
        self._last = StepSize(n, self._micro_batches, n, self._micro_batches)
        return statistics

    def explain(self) -> str:
        """Return a table of which rule counts which layer, what it is expected to cost, and what no rule covers.

        Returns:
            A text to print. Costs come with the first measured step, and are those of a step like the last one.
        """
        return explain(self._estimator, self._instrument, self._last, self._device)

    def _begin(self) -> None:
        """Start counting micro-batches, with the estimator that suits the last step best where the choice is free."""
        self._micro_batches = 0
        if self._automatic and self._last is not None:
            self._estimator, self._instrument = reconsidered(
                self._estimator, self._instrument, self._last, self._device
            )


def _check_coordinates(coordinates: object) -> None:
    """Refuse what is no reduction, and the one that reads an optimizer, before anything is measured."""
    if coordinates is None:
        return
    if not isinstance(coordinates, CoordinateReduction):
        raise InvalidArgument(f'coordinates must be CoordinateReduction(kind="max") or the like, got {coordinates!r}')
    if coordinates.kind == "weighted":
        raise InvalidArgument(
            'coordinates with kind="weighted" needs the second moments of an optimizer, which a meter does not know: '
            "use AdaptiveBatch, or another kind"
        )
