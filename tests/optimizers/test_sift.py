"""SIFT against its base optimizer, on all entries or on masked ones, and what the published code gets wrong."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers import SIFT
from adadagrad.optimizers.chosen_entries import Chosen
from adadagrad.optimizers.sift_groups import sift_groups
from tests.parallel.sharding import whole
from tests.ranks import on_ranks


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(t: int, size: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 + t)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (size,), generator=generator)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range, parts: int = 1, clear: Any = None) -> None:
    for t in steps:
        x, y = batch(t, dtype=next(model.parameters()).dtype)
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(model(a), b) / parts).backward()
        optimizer.step()
        (optimizer if clear is None else clear).zero_grad()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


BASES: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.Adagrad, {"lr": 0.1}),
]


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_at_rate_one_it_is_the_base_optimizer_after_the_step_that_chooses(
    base: Any, options: dict[str, Any], free: bool
) -> None:
    model, other = make_model(), make_model()
    train(SIFT(model.parameters(), base, rate=1.0, free_gradients=free, **options), model, range(8))
    train(base(other.parameters(), **options), other, range(1, 8))
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_equals_the_base_optimizer_under_a_mask(base: Any, options: dict[str, Any], free: bool) -> None:
    """The slow way: all moments are kept, and what is not chosen is put back after every step."""
    model, other = make_model(), make_model()
    optimizer = SIFT(model.parameters(), base, rate=0.1, free_gradients=free, **options)
    train(optimizer, model, range(9))
    x, y = batch(0)
    grads = torch.autograd.grad(F.cross_entropy(other(x), y), list(other.parameters()))
    masks, start = [], values(other)
    for grad in grads:
        k = min(int(0.1 * grad.numel()) + 1, grad.numel())
        order = sorted(range(grad.numel()), key=lambda i, g=grad: -abs(float(g.flatten()[i])))  # type: ignore[misc]
        mask = torch.zeros(grad.numel(), dtype=torch.bool)
        mask[order[:k]] = True
        masks.append(mask.view_as(grad))
    dense = base(other.parameters(), **options)
    for t in range(1, 9):
        train(dense, other, range(t, t + 1))
        with torch.no_grad():
            for p, mask, old in zip(other.parameters(), masks, start, strict=True):
                p.copy_(torch.where(mask, p, old))
    for a, b, mask, old in zip(values(model), values(other), masks, start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert torch.equal(a[~mask], old[~mask])  # bit for bit
        assert bool((a[mask] != old[mask]).all())


@pytest.mark.parametrize("rate", [1e-9, 0.05, 0.5, 1.0])
def test_number_of_entries_is_that_of_the_formula(rate: float) -> None:
    model = make_model()
    start = values(model)
    train(SIFT(model.parameters(), torch.optim.SGD, lr=0.1, rate=rate), model, range(3))
    for a, b in zip(values(model), start, strict=True):
        assert int((a != b).sum()) == min(int(rate * a.numel()) + 1, a.numel())


def test_published_count() -> None:
    """RoBERTa-large at 0.8 %: weights and biases of four projections in each of 24 layers of width 1024."""
    sizes = [1024 * 1024, 1024] * 4 * 24
    assert sum(Chosen.of(torch.empty(n, device="meta"), 0.008, master=True).count for n in sizes) == 806_208


def test_chooses_the_largest_sum_over_micro_batches() -> None:
    """The two halves alone would choose other entries."""
    p = nn.Parameter(torch.zeros(4).double())
    optimizer = SIFT([p], torch.optim.SGD, lr=1.0, rate=0.25)  # 2 of 4
    for grad in ([5.0, 3.0, 0.0, 1.0], [-5.0, 0.0, 2.5, 1.0]):
        (p * torch.tensor(grad).double()).sum().backward()
    optimizer.step()
    assert torch.equal(p.detach(), torch.zeros(4).double())  # that step only chooses
    optimizer.zero_grad()
    p.sum().backward()
    optimizer.step()
    assert p.detach().tolist() == [0.0, -1.0, -1.0, 0.0]


@pytest.mark.parametrize("free", [True, False])
def test_accumulating_over_micro_batches_is_one_large_batch(free: bool) -> None:
    found = []
    for parts in (1, 4):
        model = make_model()
        train(SIFT(model.parameters(), lr=0.01, rate=0.1, free_gradients=free), model, range(6), parts)
        found.append(values(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_every_layer_trains_under_the_models_own_zero_grad_and_nothing_is_pending() -> None:
    model, other = make_model(), make_model()
    one = SIFT(model.parameters(), lr=0.01, rate=0.1)
    start = values(model)
    train(one, model, range(5), clear=model)
    train(SIFT(other.parameters(), lr=0.01, rate=0.1), other, range(5))
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(values(model), start, strict=True))
    before = values(model)
    assert one.gradients() == []
    one.step()  # there is nothing that a further step could still merge
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_decay_shrinks_chosen_entries_alone() -> None:
    p = nn.Parameter(torch.tensor([4.0, 8.0, -2.0, 6.0]).double())
    optimizer = SIFT([p], torch.optim.AdamW, lr=0.1, weight_decay=0.5, rate=0.25, selection="magnitude")
    for _ in range(3):
        p.grad = torch.zeros(4).double()
        optimizer.step()
    assert p.detach().tolist() == pytest.approx([4.0, 8.0 * 0.95**2, -2.0, 6.0 * 0.95**2])


def test_dense_gradients_are_let_go_as_they_are_made() -> None:
    """While a backward runs, no more than one tensor's gradient is there; without hooks all are."""
    most = {}
    for free in (True, False):
        model = make_model()
        optimizer = SIFT(model.parameters(), lr=0.01, rate=0.1, free_gradients=free)
        train(optimizer, model, range(1))
        there: list[int] = []
        for p in model.parameters():
            p.register_hook(
                lambda grad, m=model, there=there: there.append(sum(q.grad is not None for q in m.parameters()))  # type: ignore[misc]
            )
        F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
        most[free] = max(there)
        assert sum(p.grad is not None for p in model.parameters()) == (0 if free else 6)
        assert len(optimizer.gradients()) == (6 if free else 0)
    assert most == {True: 0, False: 5}


def test_small_steps_add_up_in_the_float32_copy_and_vanish_without() -> None:
    found = {}
    for master in (True, False):
        p = nn.Parameter(torch.full((4,), 100.0, dtype=torch.bfloat16))
        optimizer = SIFT([p], torch.optim.SGD, lr=0.01, rate=1.0, master=master)
        for _ in range(201):
            p.grad = torch.ones(4, dtype=torch.bfloat16)
            optimizer.step()
        found[master] = float(p[0].detach())
    assert found == {True: 98.0, False: 100.0}


def test_weights_that_someone_else_has_set_count_from_then_on() -> None:
    for dtype, master in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        p = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = SIFT([p], torch.optim.SGD, lr=0.5, rate=1.0, master=master)
        for t in range(3):
            p.grad = torch.ones(4, dtype=dtype)
            if t == 2:
                p.data.fill_(8.0)
            optimizer.step()
        assert p.detach().tolist() == [7.5] * 4


def test_choosing_anew_keeps_the_moments_of_entries_that_stay() -> None:
    p = nn.Parameter(torch.zeros(4).double())
    optimizer = SIFT([p], torch.optim.SGD, lr=1.0, momentum=0.5, rate=0.25, reselect_every=2)
    grads = [
        [3.0, 2.0, 0.0, 0.0],
        [1.0, 1.0, 0.0, 0.0],
        [1.0, 1.0, 0.0, 0.0],
        [4.0, 0.0, 0.0, 8.0],
        [1.0, 1.0, 1.0, 1.0],
    ]
    for grad in grads:
        (p * torch.tensor(grad).double()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    # chosen 0, 1; moved twice: -1, then -1.5; chosen 0, 3 by [4, 0, 0, 8], which also moves them: entry 0 with
    # momentum 1.5, entry 3 with none; then by 1 with momentum 4.75 and 8
    assert p.detach().tolist() == [-2.5 - 4.75 - 3.375, -2.5, 0.0, -8.0 - 5.0]
    moment = optimizer.base.state[optimizer._chosen[p].values]["momentum_buffer"]  # type: ignore[union-attr]
    assert moment.tolist() == [3.375, 5.0]


def test_random_choices_differ_by_seed_and_parameter_and_repeat() -> None:
    def chosen(seed: int) -> list[list[int]]:
        params = [nn.Parameter(torch.ones(50)) for _ in range(2)]
        optimizer = SIFT(params, torch.optim.SGD, lr=1.0, rate=0.1, selection="random", seed=seed, reselect_every=1)
        found = []
        for t in range(3):
            before = [p.detach().clone() for p in params]
            for p in params:
                p.grad = torch.ones(50)
            optimizer.step()
            if t:
                found += [(p.detach() != b).nonzero().flatten().tolist() for p, b in zip(params, before, strict=True)]
        return found

    one = chosen(0)
    assert one == chosen(0)
    assert one != chosen(1)
    assert len({tuple(entries) for entries in one}) > 2
    assert all(len(entries) == 6 for entries in one)


def test_a_scheduler_and_changed_options_reach_the_base_optimizer() -> None:
    p = nn.Parameter(torch.zeros(2).double())
    optimizer = SIFT([p], torch.optim.SGD, lr=1.0, rate=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(4):
        p.grad = torch.ones(2).double()
        optimizer.step()
        schedule.step()
    assert p.detach().tolist() == [-0.5 - 0.25 - 0.125] * 2


def test_state_goes_on_bit_for_bit_from_every_moment(tmp_path: Any) -> None:
    options: dict[str, Any] = {"lr": 0.01, "rate": 0.1, "reselect_every": 3}
    for moment in range(8):
        model, other = make_model(torch.bfloat16), make_model(torch.bfloat16)
        one, two = SIFT(model.parameters(), **options), SIFT(other.parameters(), **options)
        train(one, model, range(moment))
        torch.save([model.state_dict(), one.state_dict()], tmp_path / "state.pt")
        weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
        train(two, other, range(20, 22))  # which has chosen other entries already
        other.load_state_dict(weights)
        two.load_state_dict(state)
        train(one, model, range(moment, 10))
        train(two, other, range(moment, 10))
        assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))


def test_groups_by_pattern() -> None:
    model = make_model()
    groups = sift_groups(model, include=["*.weight"], dense=["4.*"], rate=0.1)
    optimizer = SIFT(groups, lr=0.01, rate=0.5)
    start = values(model)
    train(optimizer, model, range(4))
    changed = [int((a != b).sum()) for a, b in zip(values(model), start, strict=True)]
    assert changed == [5, 0, 7, 0, 24, 3]  # biases are frozen, the head trains whole, from the first step on
    rows = {row["name"]: row for row in optimizer.report()}
    assert list(rows) == ["4.weight", "4.bias", "0.weight", "2.weight"]
    assert (rows["0.weight"]["entries"], rows["0.weight"]["chosen"]) == (48, 5)
    assert 5 / 48 < rows["0.weight"]["gradient_share"] ** 2 < 1
    assert rows["4.bias"]["gradient_share"] is None
    assert rows["2.weight"]["bytes"] == 7 * (8 + 4 + 16) + 4  # values, places, two moments, a count
    assert optimizer.state_bytes() == sum(row["bytes"] for row in rows.values())
    with pytest.raises(InvalidArgument, match=r"pattern '\*.query' matches no parameter: their names are like 0"):
        sift_groups(model, include=["*.query"])


def test_gradient_share_is_that_of_the_norm() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = SIFT([p], lr=0.1, rate=0.25)
    p.grad = torch.tensor([3.0, 1.0, 4.0, 1.0])
    optimizer.step()
    assert optimizer.report()[0]["gradient_share"] == pytest.approx(5 / 27**0.5)


def test_detaching_leaves_no_hook() -> None:
    model = make_model()
    optimizer = SIFT(model.parameters(), lr=0.01, rate=0.1)
    train(optimizer, model, range(2))
    assert optimizer.takes_gradients
    optimizer.detach()
    assert not optimizer.takes_gradients
    F.cross_entropy(model(batch(3)[0]), batch(3)[1]).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not optimizer.gradients()
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    before = values(model)
    optimizer.step()  # goes on from `.grad`
    assert all(not torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_an_optimizer_that_is_gone_takes_nothing() -> None:
    """Another one may follow on the same model without a word."""
    model = make_model()
    optimizer = SIFT(model.parameters(), lr=0.01, rate=0.1)
    train(optimizer, model, range(2))
    there = weakref.ref(optimizer)
    del optimizer
    assert there() is None
    F.cross_entropy(model(batch(3)[0]), batch(3)[1]).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must be > 0, got 0.0"),
        ({"rate": 1.5}, "rate must be at most 1, got 1.5"),
        ({"selection": "fisher"}, "unknown selection 'fisher'"),
        ({"reselect_every": 0}, "reselect_every must be >= 1"),
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"master": torch.float32}, "master must be True or False, got torch.float32"),
        ({"free_gradients": None}, "free_gradients must be True or False, got None"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        SIFT(make_model().parameters(), **({"lr": 0.1} | options))


def test_a_state_of_other_rates_is_refused() -> None:
    model = make_model()
    state = copy.deepcopy(SIFT(model.parameters(), lr=0.1, rate=0.1).state_dict())
    with pytest.raises(InvalidArgument, match=r"state holds 5 chosen entries of parameter 0, and there are 10 here"):
        SIFT(model.parameters(), lr=0.1, rate=0.2).load_state_dict(state)
    with pytest.raises(InvalidArgument, match=r"state holds entries of parameter 0, which is trained whole here"):
        SIFT(model.parameters(), lr=0.1, rate=None).load_state_dict(state)


def in_ddp(rank: int) -> Any:
    model = make_model()
    wrapped = DistributedDataParallel(model)
    optimizer = SIFT(model.parameters(), lr=0.01, rate=0.1, free_gradients=False)
    for t in range(5):
        x, y = batch(t)
        F.cross_entropy(wrapped(x.chunk(2)[rank]), y.chunk(2)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
    wrong = make_model()
    wrapped = DistributedDataParallel(wrong)
    optimizer = SIFT(wrong.parameters(), lr=0.01, rate=0.1)
    message = ""
    for t in range(2):
        x, y = batch(t)
        F.cross_entropy(wrapped(x.chunk(2)[rank]), y.chunk(2)[rank]).backward()
        try:
            optimizer.step()
        except (InvalidArgument, RuntimeError) as error:
            message = str(error)
        optimizer.zero_grad()
    sharded = nn.Sequential(nn.Linear(4, 4))
    whole(sharded)
    with pytest.raises(InvalidArgument, match="SIFT chooses among all entries of a tensor, and parameter 0"):
        SIFT(sharded.parameters(), lr=0.1)
    return values(model), message


def test_many_ranks_train_as_one_process_does() -> None:
    (one, message), (two, _) = on_ranks(2, in_ddp)
    model = make_model()
    train(SIFT(model.parameters(), lr=0.01, rate=0.1), model, range(5))
    for a, b, c in zip(one, two, values(model), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-12)
    assert "free_gradients=False" in message, message
