"""AdAdaGrad to the letter, against a loop over examples; and the published code's control-flow mistakes not made.

Items are numbered as in `tests/test_published_mistakes.py`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import adadagrad as ada
from tests.engine.cases import Asks, losses_of, make_data, make_engine, make_model, train, weights
from tests.oracles import example_gradients

PAPER = {"bounds": ada.Bounds.paper(), "measure": ada.Measure(every=1, max_examples=None)}


def norm(units, eta):
    g = units.mean(0)
    return float(units.var(0).sum() / (eta**2 * g.square().sum()))


def inner(units, theta):
    g = units.mean(0)
    return float((units @ g).var() / (theta**2 * g.square().sum() ** 2))


def augmented(units, theta, nu):
    g = units.mean(0)
    s = g.square().sum()
    orthogonal = units - torch.outer(units @ g / s, g)
    return max(inner(units, theta), float(orthogonal.var(0).sum() / (nu**2 * s)))


def coordinates(units, eta):
    ratio = units.var(0) / units.mean(0).square()
    return float(ratio[~ratio.isnan()].max() / eta**2)


TESTS = {
    "norm": (ada.NormTest(eta=1.1), lambda u: norm(u, 1.1)),
    "inner": (ada.InnerProductTest(theta=0.7), lambda u: inner(u, 0.7)),
    "augmented": (ada.AugmentedInnerProductTest(theta=0.7, nu=1.1), lambda u: augmented(u, 0.7, 1.1)),
    "coordinates": (ada.CoordinateNormTest(eta=400.0), lambda u: coordinates(u, 400.0)),
}
UPDATES = {
    "adagrad": (
        lambda params: torch.optim.Adagrad(params, lr=0.05),
        lambda g, v: (v.add_(g.square()), 0.05 * g / (v.sqrt() + 1e-10))[1],
        0.0,
    ),
    "adagrad norm": (
        lambda params: ada.AdaGradNorm(params, lr=0.5, initial_accumulator=0.1),
        lambda g, v: (v.add_(g.square().sum()), 0.5 * g / v.sqrt())[1],
        0.1,
    ),
}


def paper_loop(data, order, requested, update, start, cap, total, initial):
    """AdAdaGrad as an obvious loop: per-example gradients, test, ceil, cap; the verdict holds from the next step on."""
    model = make_model()
    parameters = list(model.parameters())
    x = weights(model)
    accumulator = torch.full_like(x, initial)
    b, position, trace = start, 0, []
    while position < total:
        rows = order.indices(position, min(b, total - position))
        units = example_gradients(model, losses_of(data, rows))
        x = x - update(units.mean(0), accumulator)
        with torch.no_grad():
            for p, value in zip(parameters, x.split([p.numel() for p in parameters]), strict=True):
                p.copy_(value.view_as(p))
        trace.append(len(rows))
        position += len(rows)
        if len(rows) == b and b < cap:
            asked = requested(units)
            if asked > b:
                b = min(cap, math.ceil(asked))
    return trace, x


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("micro_batch_size", [5, 64])
def test_the_engine_is_the_papers_loop(test, update, micro_batch_size):
    policy, requested = TESTS[test]
    optimizer, formula, initial = UPDATES[update]
    data, model = make_data(), make_model()
    options = {"max_batch_size": 60, "micro_batch_size": micro_batch_size, "total_samples": 707, **PAPER}
    engine = make_engine(model, optimizer(model.parameters()), data, policy, **options)
    sizes = [d.observation.global_batch_size for d in train(engine)]
    trace, x = paper_loop(data, engine._assembler.source.order, requested, formula, 4, 60, 707, initial)
    assert len(set(trace)) > 3
    assert sizes == trace
    assert (weights(model) - x).norm() <= 1e-10 * x.norm()


@pytest.mark.parametrize("test", TESTS)
def test_the_verdict_holds_from_the_next_step_on_and_jumps_to_the_ceiling(test):
    policy, requested = TESTS[test]
    data, model = make_data(), make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    decisions = train(make_engine(model, optimizer, data, policy, max_batch_size=60, **PAPER))
    for now, following in pairwise(decisions):
        assert following.plan == now.next_plan
        b = now.plan.global_batch_size
        expected = b if now.requested is None or now.requested <= b else min(60, math.ceil(now.requested))
        assert now.next_plan.global_batch_size == expected
        assert now.next_plan.global_batch_size >= b
    assert decisions[0].requested == pytest.approx(
        requested(example_gradients(model, losses_of(data, first_rows(data, 4)))), rel=1e-9
    )


def first_rows(data, count, seed=0):
    from adadagrad.batching.cursor import SampleOrder

    return SampleOrder(len(data), seed).indices(0, count)


@pytest.mark.parametrize("rest", [1, 2, 17])
@pytest.mark.parametrize("boundary", ["cross", "short"])
def test_a_short_batch_never_shrinks_the_next_one(rest, boundary):
    """Item 8: in the published code a last batch of 1 makes b = 1 for ever."""
    data = make_data(40 + rest)
    model = make_model()
    policy = ada.NormTest(eta=100.0)  # never asks to grow
    options = {"epoch_boundary": boundary, "global_batch_size": 20, "epochs": 4, **PAPER}
    engine = make_engine(model, None, data, policy, **options)
    decisions = train(engine)
    sizes = [d.observation.global_batch_size for d in decisions]
    if boundary == "short":
        assert sizes == [20, 20, rest] * 4
    else:
        assert sizes[:-1] == [20] * (len(sizes) - 1)
    assert sum(sizes) == 4 * len(data)
    assert {d.plan.global_batch_size for d in decisions} == {20}
    assert {d.next_plan.global_batch_size for d in decisions} == {20}
    short = [d for d in decisions if d.observation.global_batch_size < 20]
    assert all((d.reason, d.requested) == ("short batch", None) for d in short)


def test_a_short_batch_decides_nothing_though_its_policy_would():
    asked = []

    def answer(observation):
        asked.append(observation.global_batch_size)
        return 2.0

    options = {"epoch_boundary": "short", "global_batch_size": 20, "epochs": 3, **PAPER}
    options["bounds"] = ada.Bounds(monotone=True)
    train(make_engine(make_model(), None, make_data(47), Asks(answer), **options))
    assert asked == [20, 20] * 3


def test_samples_are_counted_as_they_are():
    """Item 9: the published code adds the nominal size, also where the last micro-batch is short."""
    for micro_batch_size in (1, 7, 16, 300):
        engine = make_engine(
            make_model(), None, make_data(), micro_batch_size=micro_batch_size, total_samples=333, **PAPER
        )
        seen = 0
        for decision in train(engine):
            seen += decision.observation.global_batch_size
            assert decision.samples_seen == decision.observation.samples_seen == seen
        assert engine.samples_seen == engine.samples_drawn == seen == 333


@pytest.mark.parametrize("micro_batch_size", [3, 7, 16])
def test_sizes_are_exact_not_rounded_up_at_every_level(micro_batch_size):
    """Item 11: the published code overshoots by up to world x accumulation - 1, and the cap."""
    asked = iter([5.2, 23.0, 23.000000000001, 41.7, 58.9, 1e9, 7.0])
    policy = Asks(lambda o: next(asked, 60.0))
    options = {"micro_batch_size": micro_batch_size, "max_batch_size": 59, "total_samples": 400, **PAPER}
    engine = make_engine(make_model(), None, make_data(), policy, **options)
    sizes = [d.observation.global_batch_size for d in train(engine)]
    assert sizes[:7] == [4, 6, 23, 23, 42, 59, 59]
    assert max(sizes) == 59


def test_a_change_of_size_does_not_restart_the_epoch():
    """Item 13: the published code builds a new loader at each change, so that examples repeat before others come."""
    data = make_data()
    engine = make_engine(make_model(), None, data, ada.NormTest(eta=0.7), epochs=3, **PAPER)
    seen, changes, last = [], 0, 4
    for step in engine:
        changes += step.global_batch_size != last
        last = step.global_batch_size
        for batch in step:
            seen += batch[2].tolist()
            step.backward(F.cross_entropy(engine.model(batch[0]), batch[1]))
        step.update()
    assert changes > 3
    for epoch in range(3):
        assert sorted(seen[epoch * len(data) : (epoch + 1) * len(data)]) == list(range(len(data)))


@pytest.mark.parametrize(("bounds", "expected"), [(ada.Bounds.paper(), 30), (ada.Bounds(), 4)])
def test_a_zero_gradient_with_noise_goes_to_the_cap_only_in_the_paper(bounds, expected):
    """Two classes of examples with opposite gradients: s = 0 exactly, V > 0."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    data = torch.utils.data.TensorDataset(torch.tensor([[1.0], [-1.0]] * 50, dtype=torch.float64))
    loader = torch.utils.data.DataLoader(data, shuffle=False)
    options = {"max_batch_size": 30, "total_samples": 60, "measure": ada.Measure(every=1), "bounds": bounds}
    engine = make_engine(model, None, loader, ada.NormTest(), **options)
    decisions = train(engine, lambda batch: model(batch[0]).mean())
    assert decisions[0].observation.gradient.grad_norm_sq == 0
    assert decisions[0].requested == math.inf
    assert decisions[0].next_plan.global_batch_size == expected
    assert decisions[0].reason.startswith("infinite")


def test_no_gradient_and_no_noise_holds():
    model = torch.nn.Linear(1, 1, bias=False).double()
    data = torch.utils.data.TensorDataset(torch.zeros(100, 1, dtype=torch.float64))
    engine = make_engine(model, None, data, ada.NormTest(), total_samples=60, **PAPER)
    decisions = train(engine, lambda batch: model(batch[0]).mean())
    assert {d.observation.global_batch_size for d in decisions} == {4}
    assert {d.reason for d in decisions} == {"nan: hold"}
    assert all(math.isnan(d.requested) for d in decisions)
