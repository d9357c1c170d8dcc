"""The batcher: which images come when, who decides, and how it goes on after a resume."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adadagrad.apps.dynamic_scale import (
    AbstractScalePolicy,
    AlwaysStitch,
    LossShareFeedback,
    NeverStitch,
    RandomPolicy,
    ScaleBatcher,
    ThresholdPolicy,
    batch_stitch,
    stitch4,
)
from adadagrad.batching import SampleOrder
from adadagrad.core.errors import EmptyDataset, InvalidArgument, UnsizedDataset
from tests.ranks import on_two_ranks

N = 23


class Numbered(Dataset[Any]):
    """Image i is full of i and has one box, small where i is even; counts what is read, and may draw at random."""

    def __init__(self, size: int = N, jitter: bool = False) -> None:
        self.size = size
        self.jitter = jitter
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        self.read.append(index)
        side = 8.0 if index % 2 == 0 else 30.0
        image = torch.full((1, 32, 32), float(index))
        if self.jitter:
            image = image + torch.rand(()) / 4 + random.random() / 4
        return image, {"boxes": torch.tensor([[0.0, 0.0, side, side]]), "labels": torch.tensor([index])}


def labels(batch: Any) -> list[int]:
    """The data set's indices of all images of a batch, in order."""
    return [label for target in batch[1] for label in target["labels"].tolist()]


def make(policy: AbstractScalePolicy, dataset: Any = None, **options: Any) -> ScaleBatcher:
    settings: dict[str, Any] = {"batch_size": 3, "seed": 7, "feedback": LossShareFeedback(400)} | options
    return ScaleBatcher(Numbered() if dataset is None else dataset, policy=policy, **settings)


def drive(batcher: ScaleBatcher, steps: int) -> list[tuple[bool, list[int]]]:
    """Train without a model: the share comes from the targets."""
    record = []
    for batch in itertools.islice(batcher, steps):
        record.append((batcher.stitched, labels(batch)))
        if batcher.feedback is not None:
            batcher.feedback.update_from_targets(batch[1])
    return record


@pytest.fixture
def closing() -> Iterator[list[ScaleBatcher]]:
    made: list[ScaleBatcher] = []
    yield made
    for batcher in made:
        batcher.close()


@pytest.mark.parametrize("policy", [ThresholdPolicy(0.0), NeverStitch()])
@pytest.mark.parametrize("workers", [0, 2])
def test_without_stitching_the_stream_is_bit_for_bit_that_of_a_plain_loader(
    policy: AbstractScalePolicy, workers: int, closing: list[ScaleBatcher]
) -> None:
    order = SampleOrder(N, seed=7)
    rows = [order.indices(3 * step, 3).tolist() for step in range(12)]
    plain = DataLoader(Numbered(), batch_sampler=rows, collate_fn=lambda pairs: tuple(zip(*pairs, strict=True)))
    batcher = make(policy, num_workers=workers)
    closing.append(batcher)
    before = torch.get_rng_state()
    mine = list(itertools.islice(batcher, 12))
    assert torch.equal(torch.get_rng_state(), before)
    for (images, targets), (expected, wanted) in zip(mine, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, expected, strict=True))
        for a, b in zip(targets, wanted, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) for name in a)
    assert batcher.stitched_fraction == 0
    assert batcher.images_read == 36


def test_without_stitching_no_other_image_is_read() -> None:
    dataset = Numbered()
    batcher = make(ThresholdPolicy(0.0), dataset)
    drive(batcher, 5)
    assert dataset.read == SampleOrder(N, seed=7).indices(0, 15).tolist()


def test_a_threshold_above_one_always_stitches() -> None:
    batcher = make(ThresholdPolicy(1.5))
    assert all(stitched for stitched, _ in drive(batcher, 10))
    assert batcher.stitched_fraction == 1
    assert batcher.images_read == 10 * 4 * 3


def test_the_first_batch_is_stitched_and_each_decision_is_on_the_step_before() -> None:
    batcher = make(ThresholdPolicy(0.4))
    feedback = batcher.feedback
    assert feedback is not None
    expected, share = [], 0.0
    for batch in itertools.islice(batcher, 30):
        expected.append(share < 0.4)
        assert batcher.stitched is expected[-1]
        share = float(torch.tensor([label % 2 == 0 for label in labels(batch)]).float().mean())
        feedback.update(
            torch.ones(len(labels(batch))), torch.tensor([1.0 if x % 2 == 0 else 900.0 for x in labels(batch)])
        )
    assert expected[0]
    assert 0 < sum(expected) < 30
    assert batcher.stitched_fraction == pytest.approx(sum(expected) / 30)


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_never_makes_a_decision_stale(workers: int, closing: list[ScaleBatcher]) -> None:
    """Shares are set by hand after each batch; what comes next obeys at once, whatever lies fetched."""
    batcher = make(ThresholdPolicy(0.5), num_workers=workers)
    closing.append(batcher)
    feedback = batcher.feedback
    assert feedback is not None
    one = torch.ones(1)
    wanted = [True, False, False, True, True, False, True]
    seen = []
    for stitch in wanted:
        feedback.update(one, one * (900 if stitch else 1))
        batch = next(batcher)
        seen.append(batcher.stitched)
        assert len(labels(batch)) == (12 if stitch else 3)
        assert len(batch[0]) == 3
    assert seen == wanted


def test_each_stream_goes_on_where_it_was_whatever_came_between() -> None:
    record = drive(make(RandomPolicy(0.4, seed=3)), 30)
    regular = [label for stitched, batch in record if not stitched for label in batch]
    stitched = [label for stitched, batch in record if stitched for label in batch]
    assert regular == SampleOrder(N, seed=7).indices(0, len(regular)).tolist()
    assert stitched != SampleOrder(N, seed=7).indices(0, len(stitched)).tolist()
    for stream in (regular, stitched):
        assert sorted(stream[:N]) == list(range(N))  # each image once an epoch


def test_seed_and_batch_size_matter() -> None:
    one = drive(make(AlwaysStitch()), 4)
    assert one == drive(make(AlwaysStitch()), 4)
    assert one != drive(make(AlwaysStitch(), seed=8), 4)
    assert drive(make(NeverStitch()), 4) != drive(make(NeverStitch(), seed=8), 4)
    assert len(drive(make(NeverStitch(), batch_size=5), 1)[0][1]) == 5


def test_stitched_batches_are_those_of_the_stitch_function() -> None:
    images, targets = next(make(AlwaysStitch()))
    indices = labels((images, targets))
    pairs = [Numbered()[index] for index in indices]
    expected, wanted = stitch4([image for image, _ in pairs], [target for _, target in pairs])
    assert all(torch.equal(a, b) for a, b in zip(images, expected, strict=True))
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, wanted, strict=True))


def test_other_k_take_batch_stitching_and_any_function_may_be_given() -> None:
    batcher = make(AlwaysStitch(), k=2)
    images, targets = next(batcher)
    assert images.shape == (6, 1, 23, 23)
    assert len(targets) == 6
    assert batcher.images_read == 6
    seen: list[int] = []

    def own(images: Any, targets: Any) -> Any:
        seen.append(len(images))
        return batch_stitch(images, targets, 4)

    images, _ = next(make(AlwaysStitch(), stitch=own))
    assert images.shape == (12, 1, 16, 16)
    assert seen == [12]


def stacked(images: Any, targets: Any) -> Any:
    return torch.stack(list(images)), targets


def test_collate_sees_both_kinds() -> None:
    assert next(make(AlwaysStitch(), collate=stacked))[0].shape == (3, 1, 32, 32)
    assert next(make(NeverStitch(), collate=stacked))[0].shape == (3, 1, 32, 32)


@pytest.mark.parametrize("policy", [ThresholdPolicy(0.5), RandomPolicy(0.5, seed=2)])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_continues_the_same_decisions_and_images(
    policy: AbstractScalePolicy, workers: int, closing: list[ScaleBatcher]
) -> None:
    def new() -> ScaleBatcher:
        feedback = LossShareFeedback(400, ema=0.3)
        closing.append(make(policy, Numbered(jitter=True), feedback=feedback, num_workers=workers))
        return closing[-1]

    whole = new()
    drive(whole, 7)
    state = json.loads(json.dumps(whole.state_dict()))
    first = drive(whole, 12)
    resumed = new()
    drive(resumed, 2)  # wherever it stood
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert drive(resumed, 12) == first
    assert {stitched for stitched, _ in first} == {True, False}
    assert resumed.state_dict() == whole.state_dict()


def test_random_augmentation_does_not_depend_on_workers_or_on_what_was_drawn_before(
    closing: list[ScaleBatcher],
) -> None:
    here, there = (make(RandomPolicy(0.5), Numbered(jitter=True), num_workers=workers) for workers in (0, 2))
    closing.append(there)
    for a, b in zip(itertools.islice(here, 6), there, strict=False):
        torch.rand(3)
        assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def test_without_an_update_the_share_is_kept() -> None:
    batcher = make(ThresholdPolicy(0.5))
    assert [batcher.stitched for _ in itertools.islice(batcher, 3)] == [True] * 3


def test_a_batch_that_fails_is_not_counted_and_comes_again() -> None:
    class Failing(Numbered):
        fail = True

        def __getitem__(self, index: int) -> Any:
            if self.fail and len(self.read) == 4:
                raise OSError("the disk is away")
            return super().__getitem__(index)

    dataset = Failing()
    batcher = make(NeverStitch(), dataset)
    next(batcher)
    with pytest.raises(OSError, match="the disk is away"):
        next(batcher)
    assert (batcher.step, batcher.images_read) == (1, 3)
    dataset.fail = False
    assert labels(next(batcher)) == SampleOrder(N, seed=7).indices(3, 3).tolist()


def test_closing_twice_and_going_on(closing: list[ScaleBatcher]) -> None:
    batcher = make(NeverStitch(), num_workers=1)
    closing.append(batcher)
    first = labels(next(batcher))
    batcher.close()
    batcher.close()
    assert [*first, *labels(next(batcher))] == SampleOrder(N, seed=7).indices(0, 6).tolist()


def two_ranks(rank: int) -> Any:
    """A threshold on unequal parts, a random policy whose seed is wrongly the rank, and a resume."""
    batcher = make(ThresholdPolicy(0.5), Numbered(24))
    record = drive(batcher, 8)
    wrong = drive(make(RandomPolicy(0.5, seed=rank), Numbered(24)), 20)
    state = batcher.state_dict()
    after = drive(batcher, 4)
    resumed = make(ThresholdPolicy(0.5), Numbered(24))
    resumed.load_state_dict(state)
    return record, wrong, drive(resumed, 4) == after


def test_ranks_decide_alike_and_read_different_images() -> None:
    first, second = on_two_ranks(two_ranks)
    for a, b in ((first[0], second[0]), (first[1], second[1])):
        assert [stitched for stitched, _ in a] == [stitched for stitched, _ in b]
    regular = [sorted(x + y) for (stitched, x), (_, y) in zip(first[1], second[1], strict=True) if not stitched]
    order = SampleOrder(24, seed=7)
    assert regular == [sorted(order.indices(6 * step, 6).tolist()) for step in range(len(regular))]
    assert first[2]
    assert second[2]


def test_ranks_are_taken_from_the_argument() -> None:
    parts = [labels(next(make(NeverStitch(), ranks=Quiet.of(index)))) for index in range(2)]
    whole = SampleOrder(N, seed=7).indices(0, 6).tolist()
    assert parts == [whole[0::2], whole[1::2]]


class Quiet:
    """Ranks that need no messages."""

    @staticmethod
    def of(index: int) -> Any:
        class Alone:
            count = 2

            def __init__(self) -> None:
                self.index = index

            def first(self, *values: float) -> tuple[float, ...]:
                return values

        return Alone()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"num_workers": -1}, "num_workers must be >= 0, got -1"),
        ({"seed": 0.5}, r"seed must be an integer, got 0\.5"),
        ({"policy": 0.1}, r"policy must be a scale policy such as ThresholdPolicy\(0\.1\), got 0\.1"),
        ({"feedback": None}, "feedback must be given with a ThresholdPolicy, got None: it would never stitch"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make(**({"policy": ThresholdPolicy()} | options))


def test_bad_data_sets() -> None:
    with pytest.raises(EmptyDataset, match="dataset holds no image"):
        make(NeverStitch(), Numbered(0))
    with pytest.raises(UnsizedDataset, match="dataset must have a length, got generator"):
        make(NeverStitch(), (_ for _ in range(3)))
    with pytest.raises(InvalidArgument, match=r"dataset must give \(image, target\) pairs, got Tensor"):
        next(make(NeverStitch(), torch.zeros(5, 1, 32, 32)))


def test_states_that_do_not_fit() -> None:
    batcher = make(NeverStitch())
    state = batcher.state_dict()
    with pytest.raises(InvalidArgument, match="state of the batcher lacks 'step'"):
        batcher.load_state_dict({})
    with pytest.raises(InvalidArgument, match="seed is 8 here but 7 in the saved state"):
        make(NeverStitch(), seed=8).load_state_dict(state)
    with pytest.raises(InvalidArgument, match="dataset_size is 9 here but 23"):
        make(NeverStitch(), Numbered(9)).load_state_dict(state)
    without = make(NeverStitch(), feedback=None).state_dict()
    with pytest.raises(InvalidArgument, match="holds no feedback, but this one has one: pass feedback=None"):
        batcher.load_state_dict(without)
