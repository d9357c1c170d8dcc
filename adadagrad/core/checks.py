"""Argument checks that name the argument: ``check_positive(eta=-1.0)`` says "eta must be > 0, got -1.0"."""

from __future__ import annotations

import math
from typing import SupportsFloat

from adadagrad.core.errors import InvalidArgument, UnknownName


def check_positive(**values: float) -> None:
    """Require every value to be a finite number above 0.

    Args:
        **values: The arguments by name.

    Raises:
        InvalidArgument: A value is zero, negative, NaN, infinite or not a number.

    Example:
        >>> check_positive(eta=0.25)
        >>> check_positive(eta=-1.0)
        Traceback (most recent call last):
        ...
        adadagrad.core.errors.InvalidArgument: eta must be > 0, got -1.0
    """
    for name, value in values.items():
        if not _is_number(value) or not (math.isfinite(value) and value > 0):
            raise InvalidArgument(f"{name} must be > 0, got {value!r}{_remedy(value, 'float')}")


def check_at_least(minimum: float, **values: float) -> None:
    """Require every value to be a finite number that is at least `minimum`.

    Args:
        minimum: The smallest allowed value.
        **values: The arguments by name.

    Raises:
        InvalidArgument: A value is below `minimum`, NaN, infinite or not a number.
    """
    for name, value in values.items():
        if not _is_number(value) or not (math.isfinite(value) and value >= minimum):
            raise InvalidArgument(f"{name} must be >= {minimum:g}, got {value!r}{_remedy(value, 'float')}")


def check_fraction(**values: float) -> None:
    """Require every value to lie in the closed interval from 0 to 1.

    Args:
        **values: The arguments by name.

    Raises:
        InvalidArgument: A value lies outside, is NaN or not a number.
    """
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value <= 1:
            raise InvalidArgument(f"{name} must be between 0 and 1, got {value!r}{_remedy(value, 'float')}")


def check_integer(minimum: int, **values: int) -> None:
    """Require every value to be an integer that is at least `minimum`; a float or a bool is refused.

    Args:
        minimum: The smallest allowed value.
        **values: The arguments by name.

    Raises:
        InvalidArgument: A value is not an `int` or is below `minimum`.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidArgument(f"{name} must be an integer, got {value!r}{_remedy(value, 'int')}")
        if value < minimum:
            raise InvalidArgument(f"{name} must be >= {minimum}, got {value}")


def check_betas(name: str, values: object) -> None:
    """Require two weights of the past, each at least 0 and below 1.

    Args:
        name: The argument's name.
        values: The pair given.

    Raises:
        InvalidArgument: It is no pair, or one of them is out of range.
    """
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise InvalidArgument(f"{name} must be two numbers such as (0.9, 0.999), got {values!r}")
    for index, value in enumerate(values):
        check_below_one(**{f"{name}[{index}]": value})


def check_below_one(**values: float) -> None:
    """Require every value to be at least 0 and below 1.

    Args:
        **values: The arguments by name.

    Raises:
        InvalidArgument: A value lies outside, is NaN or not a number.
    """
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise InvalidArgument(f"{name} must be >= 0 and below 1, got {value!r}{_remedy(value, 'float')}")


def check_tail_index(**values: float) -> None:
    """Require every value to be above 1 and at most 2: the stable noises that have a mean.

    Args:
        **values: The arguments by name.

    Raises:
        InvalidArgument: A value lies outside, is NaN or not a number.
    """
    for name, value in values.items():
        if not _is_number(value) or not 1 < value <= 2:
            raise InvalidArgument(
                f"{name} must be above 1 and at most 2, got {value!r}: 2 is noise with a variance, 1.5 a heavy tail, "
                f"and at 1 the noise has no mean{_remedy(value, 'float')}"
            )


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Require a word to be one of a fixed set; the error suggests the nearest.

    Args:
        what: The argument's name.
        value: The word given.
        choices: The words allowed.

    Raises:
        UnknownName: The word is not one of `choices`.
    """
    if value not in choices:
        raise UnknownName(what, str(value), choices)


def _remedy(value: object, kind: str) -> str:
    """What to write for a number that is not Python's own, such as NumPy's or a tensor: records hold plain numbers."""
    foreign = isinstance(value, SupportsFloat) and not isinstance(value, int | float)
    whole = kind == "int" and isinstance(value, float) and value.is_integer()
    return f": write {kind}(...) around it" if foreign or whole else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
