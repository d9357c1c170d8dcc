"""What a user chooses: how batch sizes are bounded (`Bounds`) and how often noise is measured (`Measure`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adadagrad.core.checks import check_choice, check_fraction, check_integer, check_positive
from adadagrad.core.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What may become of a requested batch size before it is used.

    Args:
        max_growth: Largest factor between one batch size and the next, > 1; None for no limit. A smaller
            factor delays growth that a noisy statistic asks for.
        multiple_of: Sizes are rounded up to a multiple of this many examples (and the cap down to one).
            Use it where a compiled model wants few input shapes. 1 keeps exact sizes.
        monotone: True never shrinks the batch, False may; None follows the policy (the tests never shrink).
        on_infinite: What an infinite request does: ``"hold"`` keeps the size and logs it, ``"cap"`` goes to
            the largest allowed size. A NaN request always holds.
        confidence: Move only where the measurement is this sure that a move is asked for, in (0.5, 1): up where the
            lower end of the one-sided interval of the request (`adadagrad.policies.interval`) still asks for more
            than the present size, down (where that is allowed) where the upper end still asks for less; the move
            goes to the request itself. Otherwise the size is held, with the reason ``"not sure"``, also in a step
            whose measurement has no standard error. A larger confidence moves later. How far off s = |g|^2 is must be
            known for it, so the engine measures inner products: about one more forward of the measured examples, or
            the gradients of all micro-batches kept. Each step is judged by itself: errors that stay large hold
            forever, and a run that asks often is now and then wrongly sure. None, the default, moves at once, as in
            the paper. Schedules are certain and not affected.

    Example:
        >>> Bounds.paper()
        Bounds(max_growth=None, multiple_of=1, monotone=True, on_infinite='cap', confidence=None)
    """

    max_growth: float | None = None
    multiple_of: int = 1
    monotone: bool | None = None
    on_infinite: Literal["hold", "cap"] = "hold"
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.max_growth is not None:
            check_positive(max_growth=self.max_growth)
            if self.max_growth <= 1:
                raise InvalidArgument(f"max_growth must be > 1 (or None for no limit), got {self.max_growth}")
        check_integer(1, multiple_of=self.multiple_of)
        check_choice("on_infinite", self.on_infinite, ("hold", "cap"))
        if self.confidence is not None:
            check_fraction(confidence=self.confidence)
            if not 0.5 < self.confidence < 1:
                raise InvalidArgument(f"confidence must be > 0.5 and < 1, for example 0.9, got {self.confidence}")

    @classmethod
    def paper(cls) -> Bounds:
        """Return the rule of the AdAdaGrad paper: never shrink, no growth limit, infinite goes to the cap."""
        return cls(max_growth=None, multiple_of=1, monotone=True, on_infinite="cap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How the gradient's noise is measured, how often, and on how many examples.

    Args:
        estimator: An estimator, or ``"auto"``: `MicroBatch` where a module mixes examples, otherwise `PerExample`, or
            `Probe` where the cost model expects far more of it for its price (`adadagrad.statistics.choosing`).
        every: Measure each so many steps; 1 is the paper, ``"auto"`` keeps the modelled average cost within
            `max_overhead`.
        max_overhead: Largest average share of a plain step's modelled cost that measuring may take with
            ``every="auto"``. Dimensionless; 0.05 is five percent.
        max_examples: Most examples of a step that are measured, so that the cost does not grow with the
            batch. None measures all of them, as the paper does.

    Example:
        >>> Measure(every=1, max_examples=None).every
        1
    """

    estimator: object = "auto"
    every: int | Literal["auto"] = "auto"
    max_overhead: float = 0.05
    max_examples: int | None = 128

    def __post_init__(self) -> None:
        if isinstance(self.estimator, str) and self.estimator != "auto":
            raise InvalidArgument(
                f'estimator must be "auto" or an estimator such as PerExample() or Probe(), got {self.estimator!r}'
            )
        if self.every != "auto":
            check_integer(1, every=self.every)
        check_positive(max_overhead=self.max_overhead)
        check_fraction(max_overhead=self.max_overhead)
        if self.max_examples is not None:
            check_integer(2, max_examples=self.max_examples)
