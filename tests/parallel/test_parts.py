"""A measured part of a step on many ranks: each rank's examples around their own mean, pooled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.batching import SampleOrder
from tests.engine.cases import losses_of, make_data, make_engine, make_model, train
from tests.ranks import on_ranks

STEP, PART = 25, 11


def of_rank(rank: int) -> Any:
    model = make_model()
    engine = make_engine(
        DistributedDataParallel(model),
        torch.optim.SGD(model.parameters(), lr=0.0),
        policy=ada.InnerProductTest(theta=1e9),
        global_batch_size=STEP,
        max_batch_size=STEP,
        bounds=ada.Bounds(monotone=False),
        min_batch_size=STEP,
        measure=ada.Measure(every=1, max_examples=PART),
        micro_batch_size=3,
        total_samples=4 * STEP,
        seed=5,
    )
    return [decision.observation.gradient for decision in train(engine)]


def gradients_of(rows: torch.Tensor) -> torch.Tensor:
    model = make_model()
    found = []
    for loss in losses_of(make_data(), rows)(model):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_pooled_variances_are_those_of_the_groups(ranks: int) -> None:
    found = on_ranks(ranks, of_rank)
    order = SampleOrder(203, seed=5)
    for number in range(4):
        start = number * STEP
        rows = order.indices(start, STEP)
        g = gradients_of(rows).mean(0)
        squares = products = freedom = 0.0
        for rank in range(ranks):
            group = gradients_of(rows[:PART][(rank - start) % ranks :: ranks])
            squares += float((group - group.mean(0)).square().sum())
            along = group @ g
            products += float((along - along.mean()).square().sum())
            freedom += len(group) - 1
        for record in (each[number] for each in found):
            assert record == found[0][number]
            assert record.num_units == PART
            assert record.num_examples == STEP
            assert record.grad_norm_sq == pytest.approx(float(g.square().sum()), rel=1e-10)
            assert record.variance_trace == pytest.approx(squares / freedom, rel=1e-10)
            assert record.inner_product_variance == pytest.approx(products / freedom, rel=1e-10)
