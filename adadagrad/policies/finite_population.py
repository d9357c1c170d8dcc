"""The correction of a batch size test for a data set that is finite and sampled without replacement."""

from __future__ import annotations

import math
from typing import Literal

from adadagrad.core.checks import check_choice
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Observation, quotient

FinitePopulation = Literal["off", "current", "solved"]

CHOICES = ("off", "current", "solved")


def check_finite_population(choice: str) -> None:
    """Require one of the known corrections.

    Args:
        choice: The word given as `finite_population`.
    """
    check_choice("finite_population", choice, CHOICES)


def finite_population_size(requested: float, observation: Observation, choice: FinitePopulation) -> float:
    r"""Correct a requested batch size for drawing b of N examples without replacement.

    .. math:: T_{current} = T_0 \frac{N - b}{N - 1}, \qquad T_{solved} = \frac{N T_0}{T_0 + N - 1}

    In code: T_0 is `requested`, N is ``observation.dataset_size`` and b the batch size of the step just taken,
    ``observation.global_batch_size`` or, where that is None, ``gradient.num_examples``.

    The mean over a batch that holds the whole data set has no variance, which a test without the factor cannot
    see: it goes on asking for more near b = N. ``"current"`` is the published factor, taken at the current b (0
    from b = N on). ``"solved"`` asks for the size at which the test with its own factor is exactly tight; it never
    exceeds N, and the answer does not depend on b. Free.

    Args:
        requested: T_0, what the test asks for without the factor [examples].
        observation: Gives N and b.
        choice: ``"off"`` returns `requested`; ``"current"`` or ``"solved"`` as above.

    Returns:
        The corrected size [examples]. An infinite or NaN request stays what it is, so that `Bounds` decides.

    Raises:
        InvalidArgument: The choice needs `dataset_size` or a batch size that the observation does not hold.

    Source: Byrd, Chin, Nocedal, Wu (2012), "Sample size selection in optimization methods for machine learning",
        the factor (N - b)/(N - 1) (from memory, unverified (high)). ``"solved"``: our extension.
    Differs from the paper: ``"current"`` does not. With the variance V taken with b - 1 in the denominator, the
        unbiased factor would be (N - b)/N; the published form is kept.

    Example:
        >>> seen = Observation(global_batch_size=51, dataset_size=101)
        >>> finite_population_size(200.0, seen, "current")
        100.0
        >>> finite_population_size(100.0, seen, "solved")
        50.5
    """
    if choice == "off":
        return requested
    size = observation.dataset_size
    if size is None:
        raise InvalidArgument(
            f'finite_population="{choice}" needs observation.dataset_size, got None: '
            'give the number of examples in the data set, or finite_population="off"'
        )
    if not math.isfinite(requested) or requested <= 0:
        return requested
    if choice == "solved":
        return quotient(size * requested, requested + size - 1)
    return requested * max(size - _current_size(observation), 0) / max(size - 1, 1)


def _current_size(observation: Observation) -> int:
    """Return b of the step just taken [examples]."""
    if observation.global_batch_size is not None:
        return observation.global_batch_size
    if observation.gradient is not None:
        return observation.gradient.num_examples
    raise InvalidArgument('finite_population="current" needs observation.global_batch_size, got None')
