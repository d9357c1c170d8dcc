"""How the answers about batch sizes write their numbers: two digits, for they are not known any better."""

from __future__ import annotations

import math


def examples(size: float) -> str:
    """Write a number of examples with two digits.

    Args:
        size: At least 0.

    Returns:
        The number; ``"any"`` where it is infinite, as the upper end of an interval.

    Example:
        >>> examples(3.21), examples(187), examples(12345), examples(0.0)
        ('3.2', '190', '12,000', '0')
    """
    if not math.isfinite(size):
        return "any"
    rounded = two_digits(size)
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:.1f}".removesuffix(".0")


def two_digits(size: float) -> float:
    """Round a number of examples to two digits, and to no finer than tenths.

    Args:
        size: At least 0, finite.

    Returns:
        The rounded number.

    Example:
        >>> two_digits(187.0), two_digits(9.97), two_digits(0.123)
        (190.0, 10.0, 0.1)
    """
    digits = 1 if size < 10 else 1 - math.floor(math.log10(size))
    return round(float(size), digits)


def between(value: float, low: float, high: float) -> str:
    """Write a size with its interval, and in words what is not known.

    Args:
        value: In examples, may be infinite.
        low: Lower end.
        high: Upper end, infinite where the gradient cannot be told from noise.

    Returns:
        The text.

    Example:
        >>> between(200, 150, 300), between(900, 400, math.inf), between(math.inf, math.inf, math.inf)
        ('200 (150 to 300)', 'at least 400', 'not above noise')
    """
    if math.isfinite(high):
        return f"{examples(value)} ({examples(low)} to {examples(high)})"
    return f"at least {examples(low)}" if math.isfinite(low) else "not above noise"


def times(value: float, low: float, high: float) -> str:
    """Write a factor with its interval.

    Args:
        value: The factor.
        low: Lower end.
        high: Upper end.

    Returns:
        The text.

    Example:
        >>> times(0.625, 0.6, 0.651)
        'x 0.62 (0.60 to 0.65)'
    """
    return f"x {value:.2f} ({low:.2f} to {high:.2f})"
