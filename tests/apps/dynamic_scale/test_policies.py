"""The policies: strict thresholds, draws that repeat, and what no share means."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from adadagrad.apps.dynamic_scale import AlwaysStitch, NeverStitch, RandomPolicy, ThresholdPolicy
from adadagrad.core.errors import InvalidArgument

SHARES = [0.0, 1e-12, 0.1, 0.5, 1.0]


def test_tau_zero_never_stitches_and_tau_above_one_always_does() -> None:
    assert not any(ThresholdPolicy(0.0).decide(share, step) for share in [*SHARES, None] for step in range(3))
    assert all(ThresholdPolicy(1.01).decide(share, step) for share in SHARES for step in range(3))


def test_the_comparison_is_strict_and_tau_matters() -> None:
    assert not ThresholdPolicy(0.1).decide(0.1, 0)
    assert ThresholdPolicy(0.3).decide(0.1, 0)
    assert ThresholdPolicy().tau == 0.1


def test_no_share_means_a_regular_batch() -> None:
    assert not ThresholdPolicy(2.0).decide(None, 0)


def test_random_draws_repeat_depend_on_seed_and_step_and_have_the_probability() -> None:
    draws = [RandomPolicy(0.3, seed=5).decide(None, step) for step in range(20000)]
    assert draws == [RandomPolicy(0.3, seed=5).decide(0.9, step) for step in range(20000)]
    assert draws[:64] != [RandomPolicy(0.3, seed=6).decide(None, step) for step in range(64)]
    assert sum(draws) / len(draws) == pytest.approx(0.3, abs=4 * (0.21 / 20000) ** 0.5)
    both = sum(a and b for a, b in itertools.pairwise(draws)) / len(draws)
    assert both == pytest.approx(0.09, abs=0.01)  # neighbours are independent
    more = [RandomPolicy(0.6, seed=5).decide(None, step) for step in range(1000)]
    assert all(b for a, b in zip(draws, more, strict=False) if a)
    assert sum(more) > sum(draws[:1000])


def test_random_ends() -> None:
    assert not any(RandomPolicy(0.0, seed=1).decide(0.0, step) for step in range(1000))
    assert all(RandomPolicy(1.0, seed=1).decide(1.0, step) for step in range(1000))


def test_always_and_never() -> None:
    for share in [*SHARES, None]:
        assert AlwaysStitch().decide(share, 3)
        assert not NeverStitch().decide(share, 3)


def test_policies_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ThresholdPolicy(0.1).tau = 0.2  # type: ignore[misc]


@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf")])
def test_bad_thresholds(tau: float) -> None:
    with pytest.raises(InvalidArgument, match="tau must be >= 0, got"):
        ThresholdPolicy(tau)


def test_bad_probabilities_and_seeds() -> None:
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(InvalidArgument, match="p must be between 0 and 1, got"):
            RandomPolicy(p)
    with pytest.raises(InvalidArgument, match=r"seed must be an integer, got 0\.5"):
        RandomPolicy(0.5, seed=0.5)  # type: ignore[arg-type]
