"""How one optimizer step is cut into micro-batches: arithmetic on sizes, a function of the plan alone.

Nothing here knows where the data's chunks begin or end, so the same plan always gives the same split, and
with it the same rounding of the gradient, whatever was trained on before.
"""

from __future__ import annotations

from functools import lru_cache

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import BatchPlan


@lru_cache(maxsize=256)
def make_plan(global_batch_size: int, micro_batch_size: int, world_size: int = 1) -> BatchPlan:
    """Describe a step of `global_batch_size` examples, spread over ranks and micro-batches.

    Args:
        global_batch_size: Examples per optimizer step over all ranks, at least one for every rank.
        micro_batch_size: Most examples in one forward on one rank.
        world_size: Number of ranks.

    Returns:
        The plan; its `accumulation_steps` are those of the rank with the most examples.

    Raises:
        InvalidArgument: A size is not an integer >= 1, or a rank would get no example.

    Example:
        >>> make_plan(100, 32).accumulation_steps, make_plan(100, 32, world_size=4).accumulation_steps
        (4, 1)
    """
    check_integer(1, global_batch_size=global_batch_size)
    check_integer(1, micro_batch_size=micro_batch_size, world_size=world_size)
    if global_batch_size < world_size:
        raise InvalidArgument(
            f"global_batch_size must be >= the number of ranks, so that none is idle: "
            f"got {global_batch_size} for {world_size} ranks"
        )
    local = -(-global_batch_size // world_size)
    return BatchPlan(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        accumulation_steps=-(-local // micro_batch_size),
        world_size=world_size,
    )


@lru_cache(maxsize=256)
def split_batch(size: int, micro_batch_size: int, measured: int | None = None) -> tuple[int, ...]:
    """Cut one rank's part of a step into full micro-batches and a rest.

    Args:
        size: Examples to process, on this rank.
        micro_batch_size: Most examples in one forward.
        measured: How many examples, from the first on, are measured. They get micro-batches of their own, so
            that measuring never touches the others. None measures all or none, and then nothing is set apart.

    Returns:
        The sizes of the micro-batches in order; they add up to `size`.

    Raises:
        InvalidArgument: A size is not an integer >= 1, or more is measured than there is.

    Example:
        >>> split_batch(10, 4)
        (4, 4, 2)
        >>> split_batch(10, 4, measured=3)
        (3, 4, 3)
    """
    check_integer(1, size=size)
    check_integer(1, micro_batch_size=micro_batch_size)
    if measured is None:
        return _full_and_rest(size, micro_batch_size)
    check_integer(1, measured=measured)
    if measured > size:
        raise InvalidArgument(f"measured must be <= size, got {measured} of {size} examples")
    return _full_and_rest(measured, micro_batch_size) + _full_and_rest(size - measured, micro_batch_size)


@lru_cache(maxsize=256)
def split_units(size: int, micro_batch_size: int, units: int) -> tuple[int, ...]:
    """Cut one rank's part of a step into near-equal micro-batches, each one unit of a gradient estimate.

    The number of micro-batches is the smallest that gives `units` of them and keeps each within
    `micro_batch_size`. Sizes differ by at most 1, the larger ones first.

    Args:
        size: Examples to process, on this rank.
        micro_batch_size: Most examples in one forward.
        units: Fewest micro-batches, at most `size`. More units make the estimate less noisy, and slower.

    Returns:
        The sizes of the micro-batches in order; they add up to `size`.

    Raises:
        InvalidArgument: A size is not an integer >= 1, or there are fewer examples than units.

    Example:
        >>> split_units(10, 8, units=4)
        (3, 3, 2, 2)
        >>> split_units(10, 2, units=4)
        (2, 2, 2, 2, 2)
    """
    check_integer(1, size=size)
    check_integer(1, micro_batch_size=micro_batch_size, units=units)
    if units > size:
        raise InvalidArgument(f"units must be <= size, got {units} units for {size} examples")
    count = max(units, -(-size // micro_batch_size))
    small, larger = divmod(size, count)
    return (small + 1,) * larger + (small,) * (count - larger)


def _full_and_rest(size: int, micro_batch_size: int) -> tuple[int, ...]:
    full, rest = divmod(size, micro_batch_size)
    return (micro_batch_size,) * full + ((rest,) if rest else ())
