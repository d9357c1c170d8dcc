"""What becomes of a requested batch size: ceil with a guard, growth limit, multiple, monotone, floor and cap.

Written once for all policies, as pure functions of plain numbers, so that all ranks decide the same.
"""

from __future__ import annotations

import math

from adadagrad.core.checks import check_at_least, check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.settings import Bounds


def ceil_with_guard(requested: float, rel: float = 1e-9) -> int:
    r"""Round a requested size up, unless rounding error alone put it beside an integer.

    .. math:: r = \mathrm{round}(T), \qquad
              b = r \;\text{if}\; |T - r| \le \mathrm{rel} \cdot \max(1, |T|), \;\text{else}\; \lceil T \rceil

    V = 9, eta = 0.3, s = 5 asks for exactly 20 examples, but V / (eta^2 s) is 20.000000000000004 in float64, and a
    bare ceil would give 21, or 20 on a platform that divides in another order. The guard is relative, because the
    rounding error of a quotient is.

    Args:
        requested: T [examples], finite; negative or zero is allowed and gives a result <= 0.
        rel: Largest relative distance taken for rounding error, >= 0, dimensionless. 1e-9 fits statistics in
            float64; 1e-6 would fit float32. 0 is the bare ceil.

    Returns:
        The whole number of examples.

    Raises:
        InvalidArgument: `requested` is NaN or infinite, or rel < 0.

    Source: this project (derived and checked); the published code uses the bare ceil.

    Example:
        >>> 9 / (0.3**2 * 5), ceil_with_guard(9 / (0.3**2 * 5))
        (20.000000000000004, 20)
        >>> ceil_with_guard(20.001)
        21
    """
    check_at_least(0, rel=rel)
    if not math.isfinite(requested):
        raise InvalidArgument(f"requested must be finite, got {requested}")
    nearest = round(requested)
    if abs(requested - nearest) <= rel * max(1.0, abs(requested)):
        return nearest
    return math.ceil(requested)


def next_batch_size(
    requested: float,
    *,
    current: int,
    bounds: Bounds,
    monotone: bool,
    minimum: int,
    maximum: int,
    interval: tuple[float, float] | None = None,
) -> tuple[int, str]:
    """Turn a policy's answer into the batch size of the next step, and say in a word what happened.

    In this order: NaN keeps the current size; plus infinity keeps it or asks for the cap, as `bounds.on_infinite`
    says; the request is rounded up with a relative guard; growth is limited to ``current * max_growth`` (rounded
    up, so that a small batch is not stuck); a monotone batch does not shrink; the size is rounded up to a multiple
    of `bounds.multiple_of`; floor and cap come last and so win. The floor is rounded up and the cap down to a
    multiple, so that the cap is never exceeded. A request that is negative counts as a small one, except minus
    infinity, which holds like every answer that is not finite.

    With `bounds.confidence` a move is made only where the nearer end of `interval`, put through the same rule, moves
    the same way: the lower end for growth, the upper one for shrinking. So a move that floor, cap or multiple force is
    made however unsure the request is, and there is never a move that there would not be without a confidence.

    Args:
        requested: The policy's answer [examples].
        current: The size *planned* for the step just taken [examples]; not the number of examples in a short last
            batch, which would shrink the batch at the end of an epoch.
        bounds: The user's rule.
        monotone: What the policy says; `bounds.monotone` overrides it where that is not None.
        minimum: Smallest size allowed, >= 1 [examples].
        maximum: Largest size allowed [examples].
        interval: Ends of what the policy might have asked for [examples], at `bounds.confidence`; None where they are
            not known. Read only where a confidence is set.

    Returns:
        The size, a multiple of `multiple_of` between `minimum` and `maximum` (the current size, whatever it is,
        where a NaN or infinite request holds), and ``"grow"``, ``"shrink"``, ``"hold"``, ``"cap"`` (the cap made
        it smaller than asked), ``"growth limit"`` (that made it smaller), ``"nan: hold"``, ``"infinite: hold"``,
        ``"infinite: cap"`` or ``"not sure"`` (held for want of confidence).

    Raises:
        InvalidArgument: No multiple of `multiple_of` lies between `minimum` and `maximum`.

    Source: Lau, Liu, Kolar (2024), "AdAdaGrad", arXiv 2402.11215, for ``Bounds.paper()``: grow to ceil(T)
        if T > b, never beyond the cap (verified in timlautk/AdAdaGrad, tests.py and main.py).
    Differs from the paper: guard, multiple, growth limit, confidence and holding at an infinite request are ours.

    Example:
        >>> rule = dict(current=64, bounds=Bounds(max_growth=4.0), monotone=True, minimum=1, maximum=1000)
        >>> next_batch_size(100.5, **rule), next_batch_size(9e9, **rule), next_batch_size(8.0, **rule)
        ((101, 'grow'), (256, 'growth limit'), (64, 'hold'))
    """
    size, reason = _bounded(requested, current, bounds, monotone, minimum, maximum)
    if bounds.confidence is None or size == current:
        return size, reason
    low, high = interval or (float(current), float(current))
    end = _bounded(low if size > current else high, current, bounds, monotone, minimum, maximum)[0]
    return (size, reason) if (size > current) == (end > current) and end != current else (current, "not sure")


def _bounded(
    requested: float, current: int, bounds: Bounds, monotone: bool, minimum: int, maximum: int
) -> tuple[int, str]:
    """Return the size and the reason without regard to confidence."""
    multiple = bounds.multiple_of
    floor, cap = _round_up(max(minimum, 1), multiple), maximum - maximum % multiple
    if floor > cap:
        raise InvalidArgument(
            f"maximum must leave room for a multiple of multiple_of={multiple} that is >= minimum, "
            f"got minimum={minimum} and maximum={maximum}"
        )
    if requested == current and floor <= current <= cap and current % multiple == 0:
        return current, "hold"  # what a constant batch asks for at every step, without the arithmetic below
    if math.isnan(requested):
        return current, "nan: hold"
    infinite = math.isinf(requested)
    if infinite and (requested < 0 or bounds.on_infinite == "hold"):
        return current, "infinite: hold"

    size = cap if infinite else ceil_with_guard(requested)
    reason = ""
    if bounds.max_growth is not None and size > current * bounds.max_growth:
        limit = ceil_with_guard(current * bounds.max_growth)
        if size > limit:
            size, reason = limit, "growth limit"
    if monotone if bounds.monotone is None else bounds.monotone:
        size = max(size, current)
    size = _round_up(max(size, floor), multiple)
    if size > cap:
        size, reason = cap, "cap"
    if infinite and size == cap:
        return cap, "infinite: cap"
    return size, reason or ("grow" if size > current else "shrink" if size < current else "hold")


def check_bounds(bounds: Bounds, *, global_batch_size: int, max_batch_size: int) -> None:
    """Refuse bounds that contradict each other, before any training.

    Args:
        bounds: The user's rule.
        global_batch_size: The first step's size [examples].
        max_batch_size: The cap [examples].

    Raises:
        InvalidArgument: One of the sizes is not an integer >= 1, the cap is below the first size or below
            `multiple_of`, or the first size is not a multiple of `multiple_of`.

    Example:
        >>> check_bounds(Bounds(), global_batch_size=64, max_batch_size=32)
        Traceback (most recent call last):
        ...
        adadagrad.core.errors.InvalidArgument: max_batch_size must be >= global_batch_size, got
        max_batch_size=32 and global_batch_size=64: raise max_batch_size or lower global_batch_size
    """
    check_integer(1, global_batch_size=global_batch_size, max_batch_size=max_batch_size)
    multiple = bounds.multiple_of
    if max_batch_size < multiple:
        raise InvalidArgument(
            f"max_batch_size must be >= multiple_of, got max_batch_size={max_batch_size} and "
            f"multiple_of={multiple}: raise max_batch_size or lower multiple_of"
        )
    if max_batch_size < global_batch_size:
        raise InvalidArgument(
            f"max_batch_size must be >= global_batch_size, got max_batch_size={max_batch_size} and "
            f"global_batch_size={global_batch_size}: raise max_batch_size or lower global_batch_size"
        )
    if global_batch_size % multiple:
        raise InvalidArgument(
            f"global_batch_size must be a multiple of multiple_of, got global_batch_size={global_batch_size} and "
            f"multiple_of={multiple}: start with {_round_up(global_batch_size, multiple)} or lower multiple_of"
        )


def _round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple that is >= size."""
    return -(-size // multiple) * multiple
