"""`Worker`: the ranks' own gradients, seen before they are averaged, however the wrapper is set up."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.batching import SampleOrder
from adadagrad.core.comm import Ranks
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics.base import Request
from tests.engine.cases import losses_of, make_data, make_engine, make_model, mean_loss, train
from tests.ranks import on_ranks

STEP = 25
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 0.0001},
}


def build(way: str, policy: Any, model: nn.Module | None = None, **options: Any) -> Any:
    model = make_model() if model is None else model
    wrapped = DistributedDataParallel(model, **WAYS.get(way, {}))
    if way == "hook":
        wrapped.register_comm_hook(None, allreduce_hook)
    options = {
        "micro_batch_size": 16,
        "measure": ada.Measure(estimator=ada.Worker(), every=1),
        "total_samples": 4 * STEP,
        "bounds": ada.Bounds(monotone=False),
        **options,
    }
    return make_engine(
        wrapped,
        torch.optim.SGD(model.parameters(), lr=0.0),
        policy=policy,
        global_batch_size=STEP,
        max_batch_size=STEP,
        min_batch_size=STEP,
        seed=5,
        **options,
    )


def of_rank(rank: int, ways: list[tuple[str, int]]) -> Any:
    found = {}
    for way, micro_batch_size in ways:
        engine = build(way, ada.InnerProductTest(theta=1e9), micro_batch_size=micro_batch_size)
        found[way, micro_batch_size] = [decision.observation.gradient for decision in train(engine)]
    return found


def units_of(rows: torch.Tensor, start: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks' mean gradients (J, d) and their numbers of examples."""
    model = make_model()
    found = []
    for loss in losses_of(make_data(), rows)(model):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found.append(torch.cat([g.flatten() for g in gradients]))
    parts = [torch.stack(found)[(rank - start) % ranks :: ranks] for rank in range(ranks)]
    return torch.stack([part.mean(0) for part in parts]), torch.tensor([len(part) for part in parts]).double()


@pytest.mark.parametrize("ranks", [2, 4])
def test_v_and_vp_are_those_of_the_ranks_gradients(ranks: int) -> None:
    ways = [(way, 16) for way in (*WAYS, "hook")] + [("plain", 3), ("views", 3), ("unused", 3)]
    found = on_ranks(ranks, of_rank, ways)
    order = SampleOrder(203, seed=5)
    for number in range(4):
        start = number * STEP
        units, n = units_of(order.indices(start, STEP), start, ranks)
        g = (n[:, None] * units).sum(0) / STEP
        variance = float((n * (units - g).square().sum(1)).sum() / (ranks - 1))
        along = units @ g
        mean = float((n * along).sum() / STEP)
        inner = float((n * (along - mean).square()).sum() / (ranks - 1))
        for way in ways:
            records = [each[way][number] for each in found]
            assert records == [records[0]] * ranks, way
            assert records[0].kind == "worker"
            assert (records[0].num_units, records[0].num_examples) == (ranks, STEP)
            assert records[0].grad_norm_sq == pytest.approx(float(g.square().sum()), rel=1e-10)
            assert records[0].variance_trace == pytest.approx(variance, rel=1e-9), way
            assert records[0].inner_product_variance == pytest.approx(inner, rel=1e-8), way


class Sometimes(nn.Module):
    """Uses its second layer for micro-batches of more than three examples only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + (self.second(x) if len(x) > 3 else 0.0)


def partly_used(rank: int) -> Any:
    """Micro-batches of 4, 3, 3 and 3 on one rank, which leave out the second layer last, and of 4 on the other."""
    engine = build("unused", ada.NormTest(eta=9.0), model=Sometimes(), micro_batch_size=4, total_samples=STEP)
    found = train(engine)[0].observation.gradient
    order, data, units = SampleOrder(203, seed=5), make_data(), []
    for other, sizes in enumerate(((4, 3, 3, 3), (4, 4, 4))):
        model, rows = Sometimes(), order.indices(0, STEP)[other::2]
        for part in rows.split(sizes):
            batch = data[part]
            (F.cross_entropy(model(batch[0]), batch[1]) * len(part) / len(rows)).backward()
        units.append((len(rows), torch.cat([p.grad.flatten() for p in model.parameters()])))
    g = sum(n * u for n, u in units) / STEP
    return found.variance_trace, float(sum(n * (u - g).square().sum() for n, u in units))


def test_parameters_that_the_last_micro_batch_leaves_out_are_counted() -> None:
    for found, expected in on_ranks(2, partly_used):
        assert found == pytest.approx(expected, rel=1e-9)


def tokens(rank: int) -> Any:
    """Losses with a weight for every example; the mean gradient is over weights."""
    engine = build("plain", ada.NormTest(eta=9.0), micro_batch_size=4)

    def loss(batch: Any) -> Any:
        losses = F.cross_entropy(engine.model(batch[0]), batch[1], reduction="none")
        return (losses * batch[3]).sum(), batch[3]

    return [decision.observation.gradient for decision in train(engine, loss)]


def test_weights_enter_the_units_and_the_mean() -> None:
    first, second = on_ranks(2, tokens)
    assert first == second
    order, data = SampleOrder(203, seed=5), make_data()
    for number, record in enumerate(first):
        rows = order.indices(number * STEP, STEP)
        weight = data.tensors[3][rows]
        model, gradients = make_model(), []
        for loss in losses_of(data, rows)(model):
            found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            gradients.append(torch.cat([x.flatten() for x in found]))
        each = torch.stack(gradients)
        g = (weight[:, None] * each).sum(0) / weight.sum()
        assert record.grad_norm_sq == pytest.approx(float(g.square().sum()), rel=1e-9)
        squares = 0.0
        for rank in range(2):
            part = slice((rank - number * STEP) % 2, None, 2)
            u = (weight[part, None] * each[part]).sum(0) / weight[part].sum()
            squares += len(each[part]) * float(u.square().sum())
        expected = squares - STEP * float(g.square().sum())
        assert record.variance_trace == pytest.approx(max(expected, 0.0), rel=1e-8, abs=1e-12)


def both(rank: int) -> Any:
    """Worker and PerExample on the same steps."""
    found = []
    for estimator in (ada.Worker(), ada.PerExample()):
        engine = build(
            "plain",
            ada.NormTest(eta=9.0),
            measure=ada.Measure(estimator=estimator, every=1, max_examples=None),
            total_samples=100 * STEP,
            data=make_data(1003),
        )
        found.append([decision.observation.gradient.variance_trace for decision in train(engine)])
    return found


def test_worker_and_per_example_agree_within_their_standard_errors() -> None:
    workers, examples = (torch.tensor(values) for values in on_ranks(4, both)[0])
    assert len(workers) == 100
    difference = workers - examples
    assert abs(float(difference.mean())) < 3 * float(difference.std()) / 10
    assert float(difference.std()) > 3 * float(examples.std()) / 10  # Worker is much the noisier one


def test_it_is_unbiased_for_equal_and_unequal_ranks() -> None:
    """2,000 steps of ranks with known noise, through the formula itself."""
    generator, trials, d = torch.Generator().manual_seed(0), 2000, 30
    scale = torch.linspace(0.2, 1.5, d, dtype=torch.float64)
    for sizes in ([8, 8, 8, 8], [16, 16, 16, 3], [1, 9]):
        n = torch.tensor(sizes, dtype=torch.float64)
        noise = torch.randn(trials, len(sizes), d, generator=generator, dtype=torch.float64) * scale
        units = 0.3 + noise / n.sqrt()[:, None]
        g = (n[:, None] * units).sum(1) / n.sum()
        v = ((n * units.square().sum(2)).sum(1) - n.sum() * g.square().sum(1)) / (len(sizes) - 1)
        signal = g.square().sum(1) - v / n.sum()
        for values, truth in ((v, float(scale.square().sum())), (signal, 0.09 * d)):
            assert abs(float(values.mean()) - truth) < 3.5 * float(values.std()) / math.sqrt(trials)
        if len(set(sizes)) == 1:  # the two-batch estimator of the noise scale, with batches of m and J m
            m, b = sizes[0], sum(sizes)
            other = (units.square().sum(2).mean(1) - g.square().sum(1)) / (1 / m - 1 / b)
            torch.testing.assert_close(v, other, rtol=1e-10, atol=1e-10)


def test_what_it_cannot_give_is_refused_by_name() -> None:
    model = make_model()
    with pytest.raises(InvalidArgument, match=r"there is one: use MicroBatch\(\)"):
        ada.GradientMeter(model, ada.Worker())
    ranks = Ranks(count=2)
    with pytest.raises(InvalidArgument, match="no coordinate ratio"):
        ada.Worker().open(model, Request(ranks=ranks, coordinates=CoordinateReduction(kind="max")))
    with pytest.raises(InvalidArgument, match=r"use MicroBatch\(\) with inner product tests"):
        ada.Worker().open(model, Request(ranks=ranks, gradient="sharded", inner_products=True))
    with pytest.raises(InvalidArgument, match="there is none for V from ranks"):
        make_engine(model, measure=ada.Measure(estimator=ada.Worker()), bounds=ada.Bounds(confidence=0.9))
    assert mean_loss(model) is not None
