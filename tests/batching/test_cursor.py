from __future__ import annotations

import pytest
import torch

from adadagrad.batching import Cursor, SampleOrder
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.mixing import seed_for, splitmix64


def test_the_hash_is_splitmix64():
    golden = 0x9E3779B97F4A7C15
    # The published reference output for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567 + i * golden) for i in range(4)] == expected
    assert seed_for(5, 6) == splitmix64(splitmix64(5) ^ 6)


def test_seeds_differ_between_runs_epochs_and_examples():
    seeds = {seed_for(s, e, i) for s in (0, 1, -1) for e in range(20) for i in range(100)}
    assert len(seeds) == 3 * 20 * 100
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == len(seeds)


def test_the_order_of_a_seed_never_changes():
    """A run saved today must find the same order tomorrow: a changed hash would train on other examples."""
    assert SampleOrder(10, seed=0).indices(0, 20).tolist() == [
        *torch.randperm(10, generator=torch.Generator().manual_seed(0xA706DD2F4D197E6F)).tolist(),
        *torch.randperm(10, generator=torch.Generator().manual_seed(seed_for(0, 1))).tolist(),
    ]


def test_every_epoch_is_a_permutation_and_no_two_are_alike():
    order = SampleOrder(50, seed=3)
    epochs = [order.indices(50 * e, 50).tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != SampleOrder(50, seed=4).indices(0, 50).tolist()
    assert epochs[2] == SampleOrder(50, seed=3).indices(100, 50).tolist()


def test_without_shuffling_every_epoch_is_the_data_sets_own_order():
    assert SampleOrder(3, seed=0, shuffle=False).indices(2, 6).tolist() == [2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_stretch_is_a_piece_of_the_one_stream(shuffle):
    whole = SampleOrder(7, 1, shuffle).locate(0, 40)
    assert [epoch for epoch, _ in whole] == [p // 7 for p in range(40)]
    order = SampleOrder(7, 1, shuffle)
    for start in (30, 0, 6, 7, 13, 2):
        for count in range(1, 10):
            assert order.locate(start, count) == whole[start : start + count]
            assert order.indices(start, count).tolist() == [i for _, i in whole[start : start + count]]


def test_the_order_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    SampleOrder(100, seed=0).indices(0, 250)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cursor_knows_its_epoch_and_what_is_left_of_it():
    cursor = Cursor(SampleOrder(10, seed=0))
    assert (cursor.epoch, cursor.until_epoch_end) == (0, 10)
    cursor.seek(19)
    assert (cursor.epoch, cursor.until_epoch_end) == (1, 1)
    cursor.seek(20)
    assert (cursor.epoch, cursor.until_epoch_end) == (2, 10)


def test_a_state_is_plain_numbers_and_comes_back():
    state = Cursor(SampleOrder(10, seed=4), 27).state_dict()
    assert state == {"position": 27, "seed": 4, "dataset_size": 10, "shuffle": True}
    cursor = Cursor(SampleOrder(10, seed=4))
    cursor.load_state_dict(state)
    assert cursor.position == 27


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed is 4 here but 5 in the saved state: .* resume with seed=5"),
        ({"dataset_size": 11}, "dataset_size is 10 here but 11 in the saved state"),
        ({"shuffle": False}, "shuffle is True here but False in the saved state"),
        ({"position": -1}, "position must be >= 0, got -1"),
        ({"position": 1.5}, "position must be an integer, got 1.5"),
    ],
)
def test_a_state_of_another_stream_is_refused(change, message):
    cursor = Cursor(SampleOrder(10, seed=4), 3)
    with pytest.raises(InvalidArgument, match=message):
        cursor.load_state_dict(cursor.state_dict() | change)
    assert cursor.position == 3


def test_a_state_with_a_hole_is_refused():
    with pytest.raises(InvalidArgument, match="lacks 'position'"):
        Cursor(SampleOrder(10, seed=4)).load_state_dict({"seed": 4, "dataset_size": 10, "shuffle": True})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SampleOrder(0, 0), "size must be >= 1, got 0"),
        (lambda: SampleOrder(3, 0.5), "seed must be an integer, got 0.5"),
        (lambda: Cursor(SampleOrder(3, 0), -1), "position must be >= 0, got -1"),
    ],
)
def test_what_places_no_example_is_refused(call, message):
    with pytest.raises(InvalidArgument, match=f"^{message}$"):
        call()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_ranks_share_the_stream_whole(size: int, ranks: int) -> None:
    whole = SampleOrder(size, seed=3).locate(0, 60)
    orders = [SampleOrder(size, seed=3, rank=rank, ranks=ranks) for rank in range(ranks)]
    for start in range(0, 30):
        for count in (1, 2, 9, 23):
            parts = []
            for order in orders:
                first, stop = order.before(start), order.before(start + count)
                assert stop - first in {count // ranks, -(-count // ranks)}
                if stop > first:
                    part = order.locate(first, stop - first)
                    assert order.indices(first, stop - first).tolist() == [index for _, index in part]
                    assert part == whole[start : start + count][(order.rank - start) % ranks :: ranks]
                    parts += part
            assert sorted(parts) == sorted(whole[start : start + count])
