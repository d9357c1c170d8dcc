"""Rounding, growth limit, multiple, monotonicity, floor and cap, and what is not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.settings import Bounds
from adadagrad.policies import ceil_with_guard, check_bounds, next_batch_size


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        (9 / (0.3**2 * 5), 20),  # 20.000000000000004
        (9 / (0.1**2 * 5), 180),  # 179.99999999999997
        (9 / (0.2**2 * 5), 45),  # 44.99999999999999
        (20.001, 21),
        (20.0, 20),
        (19.2, 20),
        (0.0, 0),
        (1e-12, 0),
        (0.3, 1),
        (-2.5, -2),
        (1e9 + 0.5, 10**9),  # the guard is relative: half an example in 1e9 is within it
        (1e8 + 0.5, 10**8 + 1),
        (1e300, int(1e300)),
    ],
)
def test_ceil(requested: float, expected: int) -> None:
    assert ceil_with_guard(requested) == expected


def test_ceil_guard_width() -> None:
    assert ceil_with_guard(20.00001) == 21
    assert ceil_with_guard(20.00001, rel=1e-6) == 20
    assert ceil_with_guard(20.000000000000004, rel=0) == 21


@pytest.mark.parametrize("requested", [math.nan, math.inf, -math.inf])
def test_ceil_refuses_what_is_not_finite(requested: float) -> None:
    with pytest.raises(InvalidArgument, match="requested must be finite"):
        ceil_with_guard(requested)


def test_ceil_refuses_a_negative_guard() -> None:
    with pytest.raises(InvalidArgument, match="rel must be >= 0, got -1"):
        ceil_with_guard(2.0, rel=-1)


def decide(requested: float, current: int = 64, minimum: int = 1, maximum: int = 1000, **rule: Any) -> tuple[int, str]:
    limits = {"monotone": rule.pop("policy_monotone", False), "interval": rule.pop("interval", None)}
    return next_batch_size(
        requested, current=current, bounds=Bounds(**rule), minimum=minimum, maximum=maximum, **limits
    )


@pytest.mark.parametrize(
    ("requested", "rule", "expected"),
    [
        (100.5, {}, (101, "grow")),
        (20.2, {}, (21, "shrink")),
        (63.5, {}, (64, "hold")),
        (1e9, {}, (1000, "cap")),
        (-5.0, {}, (1, "shrink")),
        (-5.0, {"minimum": 16}, (16, "shrink")),
        (-5.0, {"policy_monotone": True}, (64, "hold")),
        # not finite
        (math.nan, {}, (64, "nan: hold")),
        (math.nan, {"on_infinite": "cap"}, (64, "nan: hold")),
        (math.inf, {}, (64, "infinite: hold")),
        (math.inf, {"on_infinite": "cap"}, (1000, "infinite: cap")),
        (math.inf, {"on_infinite": "cap", "multiple_of": 64}, (960, "infinite: cap")),
        (math.inf, {"on_infinite": "cap", "max_growth": 2.0}, (128, "growth limit")),
        (math.inf, {"on_infinite": "cap", "current": 1000}, (1000, "infinite: cap")),
        (-math.inf, {"on_infinite": "cap"}, (64, "infinite: hold")),
        # monotone: the user's word overrides the policy's
        (20.2, {"policy_monotone": True}, (64, "hold")),
        (20.2, {"monotone": True}, (64, "hold")),
        (20.2, {"monotone": False, "policy_monotone": True}, (21, "shrink")),
        # growth limit, rounded up so that small batches are not stuck
        (1000.0, {"max_growth": 2.0}, (128, "growth limit")),
        (128.0, {"max_growth": 2.0}, (128, "grow")),
        (1e6, {"max_growth": 1e300}, (1000, "cap")),
        (20.0, {"max_growth": 1.2, "current": 2}, (3, "growth limit")),
        (20.0, {"max_growth": 1.1, "current": 10}, (11, "growth limit")),  # 10 * 1.1 = 11.000000000000002
        # multiples: up, and the cap down
        (65.0, {"multiple_of": 64}, (128, "grow")),
        (999.0, {"multiple_of": 64}, (960, "cap")),
        (1.0, {"multiple_of": 32}, (32, "shrink")),
        (1.0, {"multiple_of": 32, "minimum": 33}, (64, "hold")),
        (500.0, {"multiple_of": 64, "max_growth": 1.5}, (128, "growth limit")),
        # a cap below the current size wins
        (2000.0, {"maximum": 32, "policy_monotone": True}, (32, "cap")),
    ],
)
def test_next_batch_size(requested: float, rule: dict[str, Any], expected: tuple[int, str]) -> None:
    assert decide(requested, **rule) == expected


def test_paper_rule() -> None:
    def paper(requested: float, current: int) -> int:
        return next_batch_size(
            requested, current=current, bounds=Bounds.paper(), monotone=False, minimum=1, maximum=60_000
        )[0]

    assert paper(1.0, 64) == 64
    assert paper(64.2, 64) == 65
    assert paper(1e12, 64) == 60_000
    assert paper(math.inf, 64) == 60_000
    assert paper(math.nan, 64) == 64


def test_no_multiple_fits() -> None:
    with pytest.raises(InvalidArgument, match="maximum must leave room for a multiple of multiple_of=64"):
        decide(10.0, maximum=50, multiple_of=64)


@settings(deadline=None, max_examples=300)
@given(
    requested=st.floats(),
    multiple=st.sampled_from([1, 2, 7, 64]),
    low=st.integers(1, 40),
    room=st.integers(1, 200),
    place=st.integers(0, 10_000),
    growth=st.one_of(st.none(), st.floats(1.001, 10)),
    monotone=st.booleans(),
    on_infinite=st.sampled_from(["hold", "cap"]),
)
def test_always_in_bounds_a_multiple_and_monotone(
    requested: float,
    multiple: int,
    low: int,
    room: int,
    place: int,
    growth: float | None,
    monotone: bool,
    on_infinite: Any,
) -> None:
    minimum, maximum = low, (low // multiple + 1 + room) * multiple + multiple // 2
    sizes = [size for size in range(minimum, maximum + 1) if size % multiple == 0]
    current = sizes[place % len(sizes)]
    bounds = Bounds(max_growth=growth, multiple_of=multiple, on_infinite=on_infinite)
    rule = {"current": current, "bounds": bounds, "monotone": monotone, "minimum": minimum, "maximum": maximum}
    size, reason = next_batch_size(requested, **rule)
    assert minimum <= size <= maximum
    assert size % multiple == 0
    if monotone:
        assert size >= current
    if growth is not None:
        assert size < current * growth + 1 + multiple
    if math.isfinite(requested) and reason in {"grow", "hold", "shrink"}:
        assert size >= requested * (1 - 1e-9)  # nothing but a limit that is named gives less than was asked
    assert {"grow": size > current, "shrink": size < current, "hold": size == current}.get(reason, True)


@settings(deadline=None, max_examples=200)
@given(
    first=st.floats(allow_nan=False, allow_infinity=False),
    second=st.floats(allow_nan=False, allow_infinity=False),
    multiple=st.sampled_from([1, 8]),
    growth=st.one_of(st.none(), st.floats(1.001, 10)),
)
def test_a_larger_request_never_gives_a_smaller_batch(
    first: float, second: float, multiple: int, growth: float | None
) -> None:
    sizes = [decide(requested, multiple_of=multiple, max_growth=growth)[0] for requested in sorted([first, second])]
    assert sizes[0] <= sizes[1]


@pytest.mark.parametrize(
    ("requested", "interval", "rule", "expected"),
    [
        (100.5, (70.0, 140.0), {}, (101, "grow")),  # to the request, not to an end
        (100.5, (64.5, 140.0), {}, (101, "grow")),
        (100.5, (64.0, 140.0), {}, (64, "not sure")),  # the lower end asks for just the present size
        (100.5, (64.00000000000001, 140.0), {}, (64, "not sure")),  # within the guard
        (100.5, (20.0, math.inf), {}, (64, "not sure")),
        (20.2, (10.0, 50.0), {}, (21, "shrink")),
        (20.2, (10.0, 63.0), {}, (21, "shrink")),
        (20.2, (10.0, 63.5), {}, (64, "not sure")),  # rounded up, the upper end asks for the present size
        (20.2, (0.0, math.inf), {}, (64, "not sure")),
        (20.2, (10.0, 50.0), {"policy_monotone": True}, (64, "hold")),
        (63.5, (10.0, 500.0), {}, (64, "hold")),  # it would hold in any case
        (math.nan, (10.0, 500.0), {}, (64, "nan: hold")),
        (math.inf, (100.0, math.inf), {}, (64, "infinite: hold")),
        (math.inf, (100.0, math.inf), {"on_infinite": "cap"}, (1000, "infinite: cap")),
        (math.inf, (10.0, math.inf), {"on_infinite": "cap"}, (64, "not sure")),
        (300.0, (100.0, 900.0), {"max_growth": 2.0}, (128, "growth limit")),
        (5000.0, (100.0, 9000.0), {}, (1000, "cap")),
        (65.0, (60.0, 70.0), {"multiple_of": 64}, (64, "not sure")),
        (100.0, (65.0, 140.0), {"multiple_of": 64}, (128, "grow")),
        # what is forced is not asked
        (100.0, (10.0, 500.0), {"maximum": 32}, (32, "cap")),
        (100.0, (10.0, 500.0), {"minimum": 80}, (100, "grow")),
        # an interval that is not known is never sure
        (5000.0, None, {}, (64, "not sure")),
        (1.0, None, {}, (64, "not sure")),
        (64.0, None, {}, (64, "hold")),
        (100.0, None, {"maximum": 32}, (32, "cap")),
    ],
)
def test_confidence(
    requested: float, interval: tuple[float, float] | None, rule: dict[str, Any], expected: tuple[int, str]
) -> None:
    assert decide(requested, interval=interval, confidence=0.9, **rule) == expected


def test_without_a_confidence_the_interval_is_not_read() -> None:
    assert decide(100.5, interval=(1.0, 2.0)) == (101, "grow")


@settings(deadline=None, max_examples=300)
@given(
    requested=st.floats(),
    ends=st.one_of(st.none(), st.tuples(st.floats(0, 1e4), st.floats(0, 1e4)).map(sorted).map(tuple)),
    multiple=st.sampled_from([1, 8]),
    growth=st.one_of(st.none(), st.floats(1.001, 10)),
    monotone=st.booleans(),
    on_infinite=st.sampled_from(["hold", "cap"]),
)
def test_confidence_only_ever_holds(
    requested: float, ends: Any, multiple: int, growth: float | None, monotone: bool, on_infinite: Any
) -> None:
    """It never moves where without it holds, and where it moves, it moves to the same size for the same reason."""
    rule = {"multiple_of": multiple, "max_growth": growth, "monotone": monotone, "on_infinite": on_infinite}
    plain = decide(requested, **rule)
    sure = decide(requested, interval=ends, confidence=0.9, **rule)
    assert sure == plain or (sure == (64, "not sure") and plain[0] != 64)


@pytest.mark.parametrize(
    ("bounds", "first", "cap", "message"),
    [
        (Bounds(), 64, 32, "max_batch_size must be >= global_batch_size, got max_batch_size=32"),
        (Bounds(multiple_of=64), 64, 32, "max_batch_size must be >= multiple_of, got max_batch_size=32"),
        (Bounds(multiple_of=64), 2, 128, "global_batch_size must be a multiple of multiple_of, .* start with 64"),
        (Bounds(), 0, 32, "global_batch_size must be >= 1, got 0"),
        (Bounds(), 8, 32.0, "max_batch_size must be an integer, got 32.0"),
    ],
)
def test_contradicting_bounds(bounds: Bounds, first: int, cap: int, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_bounds(bounds, global_batch_size=first, max_batch_size=cap)


def test_consistent_bounds() -> None:
    check_bounds(Bounds(), global_batch_size=64, max_batch_size=64)
    check_bounds(Bounds(multiple_of=32), global_batch_size=64, max_batch_size=100)
