"""The share of loss on small objects: against loops in Python, over ranks, without objects, and after a resume."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adadagrad.apps.dynamic_scale import LossShareFeedback, ThresholdPolicy
from adadagrad.core.comm import ALONE
from adadagrad.core.errors import InvalidArgument, UnknownName
from tests.ranks import on_two_ranks

NOTHING = torch.zeros(0)


def sums(losses: list[float], areas: list[float], threshold: float) -> tuple[float, float]:
    """The two sums, one positive after the other."""
    small = total = 0.0
    for loss, area in zip(losses, areas, strict=True):
        total += loss
        if area < threshold:
            small += loss
    return small, total


def draws(seed: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator), torch.rand(n, generator=generator) * 3000


def test_the_worked_example() -> None:
    feedback = LossShareFeedback(area_threshold=1024)
    losses, areas = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([100.0, 2000.0, 900.0, 5000.0])
    assert feedback.update(losses, areas) == feedback.share == 0.4
    assert feedback.update(losses * 2.0**-20, areas) == 0.4  # scale of the loss
    assert feedback.update(losses.half(), areas.long()) == 0.4
    assert feedback.update(losses.requires_grad_(), areas) == 0.4


def test_the_threshold_is_strict_and_matters() -> None:
    losses, areas = torch.tensor([1.0, 3.0]), torch.tensor([1024.0, 2000.0])
    assert LossShareFeedback(1024).update(losses, areas) == 0.0
    assert LossShareFeedback(1025).update(losses, areas) == 0.25
    assert LossShareFeedback(2001).update(losses, areas) == 1.0


@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_equals_the_definition_with_and_without_memory(ema: float) -> None:
    feedback, small, total = LossShareFeedback(900, ema), 0.0, 0.0
    for step in range(20):
        losses, areas = draws(step, step % 4 + 1)
        now = sums(losses.double().tolist(), areas.double().tolist(), 900)
        small, total = ema * small + (1 - ema) * now[0], ema * total + (1 - ema) * now[1]
        assert feedback.update(losses, areas) == pytest.approx(small / total, rel=1e-12)
    assert feedback.updates == 20


def test_memory_starts_without_bias_and_forgets_slower() -> None:
    one = torch.ones(1)
    smooth, latest = LossShareFeedback(ema=0.9), LossShareFeedback()
    assert smooth.update(one, one) == 1.0  # the first share is itself, not a tenth of it
    assert smooth.update(one, 5000 * one) == pytest.approx(0.9 / 1.9)
    latest.update(one, one)
    assert latest.update(one, 5000 * one) == 0.0


def test_before_the_first_update_the_share_is_zero_so_that_a_threshold_stitches() -> None:
    assert LossShareFeedback().share == 0.0
    assert ThresholdPolicy(0.1).decide(LossShareFeedback().share, 0)
    assert not ThresholdPolicy(0.0).decide(LossShareFeedback().share, 0)


def test_no_small_objects_is_a_share_of_zero_and_only_small_ones_of_one() -> None:
    feedback = LossShareFeedback()
    assert feedback.update(torch.ones(3), torch.full((3,), 4000.0)) == 0.0
    assert not feedback.empty
    assert feedback.update(torch.ones(3), torch.ones(3)) == 1.0


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize(
    ("on_empty", "share", "stitch"), [("regular", None, False), ("keep", 0.75, False), ("stitch", 0.0, True)]
)
@pytest.mark.parametrize("losses", [NOTHING, torch.zeros(2), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])])
def test_a_step_without_a_share_follows_the_declared_way(
    losses: Tensor, on_empty: Any, share: float | None, stitch: bool, ema: float
) -> None:
    feedback = LossShareFeedback(ema=ema, on_empty=on_empty)
    feedback.update(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 5000.0]))
    assert feedback.share == 0.75
    assert feedback.update(losses, torch.ones(len(losses))) == feedback.share == share
    assert feedback.empty
    assert (feedback.updates, feedback.empty_updates) == (2, 1)
    assert ThresholdPolicy(0.1).decide(feedback.share, 2) is stitch
    assert not ThresholdPolicy(0.0).decide(feedback.share, 2)
    after = feedback.update(torch.ones(2), torch.tensor([1.0, 5000.0]))  # and the memory is as it was
    small, total = ema * (1 - ema) * 3 + (1 - ema), ema * (1 - ema) * 4 + 2 * (1 - ema)
    assert after == pytest.approx(small / total, rel=1e-12)
    assert not feedback.empty


def test_keep_before_anything_is_known_keeps_the_first_share() -> None:
    feedback = LossShareFeedback(on_empty="keep")
    assert feedback.update(NOTHING, NOTHING) == 0.0


def two_ranks(rank: int) -> list[Any]:
    """Rank 0 has small objects only, rank 1 large ones only, then nothing, then nobody has any, then a bad loss."""
    feedback, alone = LossShareFeedback(), LossShareFeedback(reduce=ALONE.sum)
    area = torch.tensor([100.0 if rank == 0 else 4000.0])
    loss = torch.tensor([1.0 if rank == 0 else 3.0])
    shares: list[Any] = [feedback.update(loss, area), alone.update(loss, area)]
    shares.append(feedback.update(*((loss, area) if rank == 0 else (NOTHING, NOTHING))))
    shares.append(feedback.update(NOTHING, NOTHING))
    before = feedback.state_dict()
    try:
        feedback.update(loss if rank == 0 else -loss, area)
    except InvalidArgument as error:
        shares.append(str(error))
    shares.append(feedback.state_dict() == before)
    return shares


def test_ranks_with_different_positives_have_one_share_and_one_error() -> None:
    first, second = on_two_ranks(two_ranks)
    assert first[0] == second[0] == 0.25  # of the sums, not the mean of the ranks' shares
    assert (first[1], second[1]) == (1.0, 0.0)  # each for itself would disagree at any tau
    assert first[2] == second[2] == 1.0
    assert first[3] is second[3] is None
    assert first[4] == second[4] == "losses and areas must be >= 0, got 1 that are negative or NaN areas"
    assert first[5]
    assert second[5]


def test_simulated_ranks_reach_one_decision() -> None:
    """Without processes: what the ranks hand over is added by hand."""
    parts = [((1.0, 2.0), (10.0, 3000.0)), ((5.0,), (5000.0,))]
    handed: list[tuple[float, ...]] = []

    def collect(*values: float) -> tuple[float, ...]:
        handed.append(values)
        return values

    for losses, areas in parts:
        LossShareFeedback(reduce=collect).update(torch.tensor(losses), torch.tensor(areas))
    whole = tuple(map(sum, zip(*handed, strict=True)))
    shares = [
        LossShareFeedback(reduce=lambda *_: whole).update(torch.tensor(losses), torch.tensor(areas))
        for losses, areas in parts
    ]
    assert shares == [0.125, 0.125]
    assert {ThresholdPolicy(0.2).decide(share, 1) for share in shares} == {True}


def target(*boxes: list[float], **more: Any) -> dict[str, Any]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), **more}


def test_feedback_from_targets_by_count_and_by_area() -> None:
    targets = [target([0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 40.0, 50.0]), target(), target([5.0, 5.0, 25.0, 45.0])]
    assert LossShareFeedback().update_from_targets(targets) == pytest.approx(2 / 3)
    assert LossShareFeedback().update_from_targets(targets, by="area") == pytest.approx(900 / 2900)
    assert LossShareFeedback(500).update_from_targets(targets, by="area") == pytest.approx(100 / 2900)


def test_feedback_from_targets_leaves_out_crowds() -> None:
    crowded = target([0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 40.0, 50.0], iscrowd=torch.tensor([1, 0]))
    assert LossShareFeedback().update_from_targets([crowded]) == 0.0


def test_feedback_from_targets_without_objects_is_empty() -> None:
    for targets in ([], [target()], [target([0.0, 0.0, 9.0, 9.0], iscrowd=torch.ones(1))]):
        feedback = LossShareFeedback()
        assert feedback.update_from_targets(targets) is None
        assert feedback.empty


def test_resuming_continues_the_same_shares() -> None:
    whole, resumed = LossShareFeedback(ema=0.5), LossShareFeedback(ema=0.5)
    for step in range(3):
        whole.update(*draws(step, 5))
    state = json.loads(json.dumps(whole.state_dict()))
    resumed.load_state_dict(state)
    assert resumed.share == whole.share
    for step in range(3, 6):
        assert resumed.update(*draws(step, 5)) == whole.update(*draws(step, 5))
    assert resumed.state_dict() == whole.state_dict()
    assert whole.state_dict() != state


def test_a_state_that_lacks_an_entry_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="state of the feedback lacks 'total'"):
        LossShareFeedback().load_state_dict({"small": 0.0})


@pytest.mark.parametrize(
    ("losses", "areas", "message"),
    [
        (1.0, torch.ones(1), r"losses must be a tensor \(n,\), one number a positive, got float"),
        (torch.ones(()), torch.ones(1), r"losses must be a tensor \(n,\), one number a positive, got \(\)"),
        (torch.ones(2), torch.ones(2, 1), r"areas must be a tensor \(n,\), one number a positive, got \(2, 1\)"),
        (torch.ones(2), torch.ones(3), "losses and areas must have one length, got 2 and 3"),
        (torch.tensor([1.0, -1.0]), torch.ones(2), "losses and areas must be >= 0, got 1 that are negative"),
        (torch.ones(2), torch.tensor([math.nan, -1.0]), "got 2 that are negative or NaN areas"),
    ],
)
def test_bad_updates_change_nothing(losses: Any, areas: Any, message: str) -> None:
    feedback = LossShareFeedback()
    with pytest.raises(InvalidArgument, match=message):
        feedback.update(losses, areas)
    assert feedback.state_dict() == LossShareFeedback().state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area_threshold": 0}, "area_threshold must be > 0, got 0"),
        ({"ema": 1.0}, "ema must be >= 0 and below 1, got 1.0"),
        ({"reduce": 3}, "reduce must be a function such as Ranks.sum, or None, got int"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        LossShareFeedback(**options)


def test_words_that_are_none() -> None:
    with pytest.raises(UnknownName, match="unknown on_empty 'nan'"):
        LossShareFeedback(on_empty="nan")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown by 'loss'"):
        LossShareFeedback().update_from_targets([target()], by="loss")  # type: ignore[arg-type]
