"""Every optimizer under the engine, with changing batches: the same run as a loop by hand, as one resumed, as ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.optimizing import Extrapolating, Reevaluating
from tests.engine.cases import Sizes, make_data, make_engine, make_model, train, weights
from tests.engine.test_gradient import rows_of_steps
from tests.optimizers.cases import CASES, Case, take_step
from tests.parallel.sharding import layers, whole_weights
from tests.ranks import on_ranks

each = pytest.mark.parametrize("case", CASES, ids=str)


def build(case: Case, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    small: dict[str, Any] = {"rate": 0.2} if case.name == "SIFT" else {}
    return case.build(model.parameters(), lr=0.1 * case.lr, **(small | options))


def engine_for(model: nn.Module, optimizer: torch.optim.Optimizer, policy: Any = None, **options: Any) -> Any:
    again = isinstance(optimizer, Reevaluating) and optimizer.needs_closure
    policy = Sizes(largest=30) if policy is None else policy
    return make_engine(model, optimizer, policy=policy, replay=again, micro_batch_size=7, **options)


def by_hand(optimizer: torch.optim.Optimizer, model: nn.Module, batches: list[Tensor]) -> Tensor:
    x, y, _, _ = make_data().tensors
    for rows in batches:

        def evaluate(rows: Tensor = rows) -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            return loss.item()

        take_step(optimizer, evaluate)
    return weights(model)


@each
def test_equals_a_loop_by_hand(case: Case) -> None:
    """In micro-batches of seven here, in one piece there."""
    model, other = make_model(), make_model()
    engine = engine_for(model, build(case, model))
    decisions = train(engine)
    assert len({d.observation.global_batch_size for d in decisions}) > 10
    expected = by_hand(build(case, other), other, rows_of_steps(engine, decisions))
    bar = 1e-3 if case.name in ("MARS shampoo", "MARSM") else 1e-9  # bfloat16 shows the last bit of a gradient
    torch.testing.assert_close(weights(model), expected, rtol=bar, atol=bar)


@each
def test_a_resumed_run_goes_on_bit_for_bit(case: Case, tmp_path: Any) -> None:
    models = [make_model() for _ in range(3)]
    whole, part, rest = (engine_for(model, build(case, model)) for model in models)
    train(whole)
    train(part, steps=7)
    part.save(tmp_path / "run.pt")
    rest.load(tmp_path / "run.pt")
    train(rest)
    assert torch.equal(weights(models[0]), weights(models[2]))


@each
def test_measures_and_grows(case: Case) -> None:
    """Under a norm test; what keeps chosen entries alone is told how to measure."""
    model = make_model()
    options = {"global_batch_size": 8, "measure": ada.Measure(every=1, max_examples=None)}
    if case.name == "SIFT":
        with pytest.raises(InvalidArgument, match=r"optimizer SIFT .* nothing can be measured .*free_gradients=False"):
            engine_for(model, build(case, model), ada.NormTest(eta=0.5), **options)
    more = {"free_gradients": False} if case.name == "SIFT" else {}
    optimizer = build(case, model, **more)
    decisions = train(engine_for(model, optimizer, ada.NormTest(eta=0.5), **options))
    sizes = [d.observation.global_batch_size for d in decisions][:-1]  # the last is what the budget leaves
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]
    marks = {d.observation.gradient.displaced for d in decisions if d.observation.gradient is not None}
    assert marks == {isinstance(optimizer, Extrapolating)}


def test_sift_is_scaled_and_clipped_through_what_it_has_taken() -> None:
    """Token weights correct the gradient after the backward, and clipping follows: hooks or none, the same."""
    found = []
    for free in (True, False):
        model = make_model()
        optimizer = ada.SIFT(model.parameters(), torch.optim.SGD, lr=0.3, rate=1.0, free_gradients=free)
        engine = engine_for(model, optimizer, max_grad_norm=0.2)

        def loss(batch: Any, model: nn.Module = model) -> tuple[Tensor, Tensor]:
            x, y, _, w = batch
            return (F.cross_entropy(model(x), y, reduction="none") * w).sum(), w

        decisions = train(engine, loss)
        assert all(d.reason != "skipped: non-finite" for d in decisions)
        found.append(weights(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)


RANKS_CASES = [case for case in CASES if not case.name.startswith("Extrapolated")]
"""The extrapolating ones have ranks of their own in tests/optimizers/test_extrapolation_ranks.py."""


def in_ddp(rank: int) -> dict[str, Tensor]:
    found = {}
    for case in RANKS_CASES:
        model = make_model()
        more = {"free_gradients": False} if case.name == "SIFT" else {}
        optimizer = build(case, model, **more)
        train(engine_for(DistributedDataParallel(model), optimizer, min_batch_size=2))
        found[case.name] = weights(model)
    model = make_model()
    with pytest.raises(InvalidArgument, match=r"takes gradients out of .grad before the ranks have averaged them"):
        engine_for(DistributedDataParallel(model), ada.SIFT(model.parameters(), lr=0.1), min_batch_size=2)
    return found


def in_shards(rank: int) -> dict[str, Tensor]:
    found = {}
    for case in RANKS_CASES:
        if case.shards:
            model = make_model()
            layers(model)
            train(engine_for(model, build(case, model), min_batch_size=2))
            found[case.name] = whole_weights(model)
    return found


@pytest.mark.parametrize("way", [in_ddp, in_shards])
def test_many_ranks_train_as_one_process_does(way: Any) -> None:
    one, two = on_ranks(2, way)
    assert len(one) >= 7
    for case in RANKS_CASES:
        if case.name in one:
            assert torch.equal(one[case.name], two[case.name])
            model = make_model()
            train(engine_for(model, build(case, model), min_batch_size=2))
            bar = 1e-3 if case.name in ("MARS shampoo", "MARSM") else 1e-9
            torch.testing.assert_close(
                one[case.name], weights(model), rtol=bar, atol=bar, msg=lambda m, c=case: f"{c}: {m}"
            )


def past_local(model: nn.Module) -> Any:
    return ada.ExtrapolatedSGD(model.parameters(), lr=0.05, extrapolation=2.0)


def saved_by_two(rank: int, folder: str) -> tuple[Tensor, Tensor]:
    model = make_model()
    wrapped, optimizer = DistributedDataParallel(model), past_local(model)
    optimizer.keep_local_gradients(wrapped)
    engine = engine_for(wrapped, optimizer, min_batch_size=2)
    train(engine, steps=7)
    engine.save(f"{folder}/run.pt")
    own = torch.cat([optimizer.state[p]["local_gradient"].flatten() for p in model.parameters()])
    train(engine)
    other, more = make_model(), None
    wrapped, more = DistributedDataParallel(other), past_local(other)
    more.keep_local_gradients(wrapped)
    again = engine_for(wrapped, more, min_batch_size=2)
    again.load(f"{folder}/run.pt")
    assert torch.equal(own, torch.cat([more.state[p]["local_gradient"].flatten() for p in other.parameters()]))
    train(again)
    assert torch.equal(weights(model), weights(other))
    return own, weights(model)


def test_each_rank_saves_its_own_past_gradient_which_another_number_of_ranks_forgets(tmp_path: Any) -> None:
    (one, ours), (two, theirs) = on_ranks(2, saved_by_two, str(tmp_path))
    assert not torch.equal(one, two)
    assert torch.equal(ours, theirs)
    model = make_model()
    optimizer = past_local(model)
    engine = engine_for(model, optimizer, min_batch_size=2)
    engine.load(tmp_path / "run.pt")
    assert all(not optimizer.state[p]["local_gradient"].any() for p in model.parameters())
    assert all(bool(optimizer.state[p]["velocity"].any()) for p in model.parameters())
    train(engine)
    assert engine.samples_seen == 700


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_error_in_a_step_leaves_the_true_parameters_to_whoever_handles_it(by_hand: bool) -> None:
    model = make_model()
    engine = engine_for(model, past_local(model))
    train(engine, steps=3)
    before, seen = weights(model), []

    def fails(batch: Any) -> Tensor:
        seen.append(weights(model))
        raise RuntimeError("no more")

    def go_on() -> None:
        for step in engine:
            if by_hand:
                for batch in step:
                    step.backward(fails(batch))
            step.run(fails)

    try:
        go_on()
    except RuntimeError:
        assert torch.equal(weights(model), before)
    assert not torch.equal(seen[0], before)
    train(engine)
    assert engine.samples_seen == 700
