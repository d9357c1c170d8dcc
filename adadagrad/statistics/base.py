"""What an estimator is: a frozen choice that opens an `AbstractInstrument` on a model."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from adadagrad.core.comm import ALONE, Ranks
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics.planner import StepSize

Coefficients = float | Sequence[float] | Tensor | Callable[[], "float | Tensor"] | None
"""c_i, the weight with which example i enters the gradient that is being built: one number, or one per example
(n,), or a function that gives either once the backward has run. None means 1 / n, a mean-reduced loss."""

Watch: TypeAlias = Callable[[Callable[[nn.Parameter, Tensor], None]], AbstractContextManager[None]]
"""Given a function, returns a context whose backwards hand it every parameter and this rank's own gradient for it, of
full shape, once for each backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which numbers a measurement must give beside s and V, which always come.

    Args:
        inner_products: Also Vp, the variance of <g_i, g>.
        coordinates: Also the ratio V_j / g_j^2 under this reduction; None for none.
        second_moment: Gives a parameter's second moment for the ``"weighted"`` reduction, None where unknown.
        ranks: The processes whose examples make up the step.
        gradient: What `.grad` holds on this rank once the step's backward is over: ``"shared"``, the mean over all
            ranks, of which a measured micro-batch that is not the last sees its own rank's part; ``"sharded"``, this
            rank's shard of that mean, after every measured micro-batch; or ``"local"``, the mean over this rank's own
            examples (local steps).
        watch: Hands over each parameter's own gradient on this rank, where the parameters are not the leaves of its
            graph (``"sharded"``); None where they are.
    """

    inner_products: bool = False
    coordinates: CoordinateReduction | None = None
    second_moment: Callable[[nn.Parameter], Tensor | None] | None = None
    ranks: Ranks = ALONE
    gradient: Literal["shared", "sharded", "local"] = "shared"
    watch: Watch | None = None


class AbstractInstrument(abc.ABC):
    """An estimator at work on one model, step by step: micro-batches, end of the group, finish.

    A measured step is one or more measured micro-batches, then `finish`. Where only a part of the step is
    measured, that part comes first, then `close_group`, then the micro-batches that are not measured. Every
    `.grad` must be None when the first micro-batch starts. Nothing here changes a `.grad`, but for
    the rounding of one that is summed example by example (`fusing.py`).
    """

    seconds: float
    """Wall-clock seconds spent measuring so far; on an accelerator the time to launch the work."""

    @property
    def innermost(self) -> AbstractInstrument:
        """The instrument that measures, where this one works on another's results; otherwise itself."""
        return self

    @property
    @abc.abstractmethod
    def failure(self) -> Exception | None:
        """Why the step in progress will have no statistics, on this rank; None where nothing has failed."""

    @property
    @abc.abstractmethod
    def compiled(self) -> str:
        """Which micro-batches of a compiled model run its compiled code, in one line; empty if nothing is compiled."""

    @abc.abstractmethod
    def micro_batch(
        self, num_examples: int | None = None, coefficients: Coefficients = None
    ) -> AbstractContextManager[None]:
        """Return a context for the forward and backward of one measured micro-batch.

        Args:
            num_examples: n, rows of the micro-batch; None reads it off the model's first tensor argument.
            coefficients: c_i; see `Coefficients`.

        Returns:
            A context manager; leaving it reads off the statistic.
        """

    @abc.abstractmethod
    def close_group(self) -> None:
        """Say that the measured part of the step is over: `.grad` holds its weighted sum, and more will follow."""

    @abc.abstractmethod
    def finish(
        self, num_examples: int | None = None, weight_sq_sum: float | None = None, scale: float = 1.0
    ) -> GradientStatistics:
        """Return the statistics; `.grad` must hold the step's final mean gradient, before clipping.

        Args:
            num_examples: b, examples averaged into that gradient; None means the measured ones.
            weight_sq_sum: Sum of their squared weights; None means 1 / b.
            scale: Factor by which the gradients have been multiplied since the backward.

        Returns:
            The record, with what the request asked for.
        """

    @abc.abstractmethod
    def discard(self) -> None:
        """Forget the step in progress, if any; the next micro-batch starts a new one."""

    @abc.abstractmethod
    def costs(self, step: StepSize, device: str) -> tuple[float, float]:
        """Return what the cost model says of a step: without measuring, and what measuring adds.

        Args:
            step: The sizes.
            device: Device type.

        Returns:
            Two costs in modelled seconds, for comparison with each other only.
        """

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what the instrument has learnt about the model, as plain lists, numbers and words."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what another instrument on the same model has learnt, so that a resumed run repeats.

        Args:
            state: What `state_dict` returned.
        """


class AbstractEstimator(abc.ABC):
    """How the four numbers are come by; see the subclasses for what a unit is and what it costs."""

    @abc.abstractmethod
    def open(self, model: nn.Module, request: Request) -> AbstractInstrument:
        """Go to work on a model.

        Args:
            model: The module whose parameters' gradients are measured.
            request: The numbers wanted.

        Returns:
            The instrument, used for every measured step of a run.
        """

    @property
    def innermost(self) -> AbstractEstimator:
        """The estimator that measures, where this one works on another's results; otherwise itself."""
        return self

    def settled(self, model: nn.Module) -> AbstractEstimator:
        """Return the same estimator with every choice made that it leaves to the model.

        Args:
            model: The model to be measured.

        Returns:
            An estimator whose `innermost` is what will measure; here this one.
        """
        return self


def check_estimator(estimator: object) -> AbstractEstimator | None:
    """Refuse what is neither an estimator nor ``"auto"``.

    Args:
        estimator: What the user gave.

    Returns:
        The estimator; None for ``"auto"``.

    Raises:
        InvalidArgument: It is neither.
    """
    if isinstance(estimator, str) and estimator == "auto":
        return None
    if isinstance(estimator, AbstractEstimator):
        return estimator
    if isinstance(estimator, type) and issubclass(estimator, AbstractEstimator):
        raise InvalidArgument(f"estimator must be an instance, got the class: write {estimator.__name__}()")
    raise InvalidArgument(
        f'estimator must be "auto" or an estimator such as PerExample() or Probe(), got {estimator!r}'
    )
