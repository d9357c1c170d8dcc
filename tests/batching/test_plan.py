from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adadagrad.batching import make_plan, split_batch, split_units
from adadagrad.core.errors import InvalidArgument

sizes = st.integers(1, 500)


@given(sizes, sizes)
def test_a_split_is_full_micro_batches_and_one_rest(size, micro):
    parts = split_batch(size, micro)
    assert sum(parts) == size
    assert set(parts[:-1]) <= {micro}
    assert 1 <= parts[-1] <= micro


@given(sizes, sizes, st.data())
def test_measured_examples_have_micro_batches_of_their_own(size, micro, data):
    measured = data.draw(st.integers(1, size))
    parts = split_batch(size, micro, measured)
    head = split_batch(measured, micro)
    assert parts[: len(head)] == head
    assert sum(head) == measured
    assert parts[len(head) :] == (split_batch(size - measured, micro) if measured < size else ())


@given(sizes, sizes, st.data())
def test_units_are_near_equal_and_as_few_as_allowed(size, micro, data):
    units = data.draw(st.integers(1, size))
    parts = split_units(size, micro, units)
    assert sum(parts) == size
    assert max(parts) <= micro
    assert max(parts) - min(parts) <= 1
    assert len(parts) == max(units, -(-size // micro))


@given(sizes, sizes, st.integers(1, 9))
def test_a_plan_holds_its_batch_and_no_forward_more(size, micro, ranks):
    if size < ranks:
        with pytest.raises(InvalidArgument, match=rf"global_batch_size .* got {size} for {ranks} ranks"):
            make_plan(size, micro, ranks)
        return
    plan = make_plan(size, micro, ranks)
    assert plan.accumulation_steps * micro * ranks >= size
    assert (plan.accumulation_steps - 1) * micro * ranks < size
    assert (plan.global_batch_size, plan.micro_batch_size, plan.world_size) == (size, micro, ranks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_batch(0, 4), "size must be >= 1, got 0"),
        (lambda: split_batch(4, 0), "micro_batch_size must be >= 1, got 0"),
        (lambda: split_batch(4, 2, measured=0), "measured must be >= 1, got 0"),
        (lambda: split_batch(4, 2, measured=5), "measured must be <= size, got 5 of 4 examples"),
        (lambda: split_batch(4.0, 2), r"size must be an integer, got 4.0: write int\(...\) around it"),
        (lambda: split_units(0, 2, 1), "size must be >= 1, got 0"),
        (lambda: split_units(4, 0, 1), "micro_batch_size must be >= 1, got 0"),
        (lambda: split_units(4, 2, 0), "units must be >= 1, got 0"),
        (lambda: split_units(3, 2, 4), "units must be <= size, got 4 units for 3 examples"),
        (lambda: make_plan(0, 1), "global_batch_size must be >= 1, got 0"),
        (lambda: make_plan(8, 0), "micro_batch_size must be >= 1, got 0"),
        (lambda: make_plan(8, 1, 0), "world_size must be >= 1, got 0"),
    ],
)
def test_sizes_that_make_no_sense_are_named(call, message):
    with pytest.raises(InvalidArgument, match=f"^{message}$"):
        call()
