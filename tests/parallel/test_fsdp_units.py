"""`MicroBatch` and `Worker` on a sharded model: the definition, on the gradients of units worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

import adadagrad as ada
from adadagrad.batching import SampleOrder
from adadagrad.core.errors import InvalidArgument, UncoveredParameter
from tests.engine.cases import make_data, make_engine, make_model, train
from tests.parallel import sharding
from tests.ranks import on_ranks

STEP, STEPS = 26, 3


def gradient(rows: Any, weighted: bool, model: nn.Module) -> torch.Tensor:
    data = make_data()
    losses = F.cross_entropy(model(data.tensors[0][rows]), data.tensors[1][rows], reduction="none")
    weight = data.tensors[3][rows] if weighted else torch.ones(len(rows)).double()
    mean = (losses * weight).sum() / weight.sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(model.parameters()))])


def by_hand(units: list[Any], weighted: bool) -> tuple[float, float, float]:
    """V, Vp and s of a step from units of examples: those of `MicroBatch`, whatever their sizes."""
    model = make_model()
    weights = make_data().tensors[3]
    us = [gradient(rows, weighted, model) for rows in units]
    c = [float(weights[rows].sum()) if weighted else float(len(rows)) for rows in units]
    n = [len(rows) for rows in units]
    g = sum(w * u for w, u in zip(c, us, strict=True)) / sum(c)
    s, b, k = float(g @ g), sum(n), len(units)
    v = (sum(m * float(u @ u) for m, u in zip(n, us, strict=True)) - b * s) / (k - 1)
    p = [float(u @ g) for u in us]
    mean = sum(m * q for m, q in zip(n, p, strict=True)) / b
    return v, sum(m * (q - mean) ** 2 for m, q in zip(n, p, strict=True)) / (k - 1), s


def cut(rows: Any, units: int) -> list[Any]:
    """As `split_units` does: as even as possible, larger ones first."""
    return list(rows.tensor_split(units))


def measured(rank: int, ranks: int) -> Any:
    """Relative errors of what is measured, by case."""
    found = {}
    order = SampleOrder(203, seed=5)
    for shard in ("whole", "layers", "one_part", "but_biases"):
        for kind, estimator, policy in (
            ("units", ada.MicroBatch(), ada.NormTest(eta=100.0)),
            ("products", ada.MicroBatch(units=3), ada.InnerProductTest(theta=100.0)),
            ("worker", ada.Worker(), ada.NormTest(eta=100.0)),
        ):
            if kind == "worker" and ranks == 1:
                continue
            for weighted in (False, True):
                model = make_model()
                getattr(sharding, shard)(model)
                kinds: dict[bool, list[Any]] = {}
                for p in model.parameters():
                    kinds.setdefault(isinstance(p, DTensor), []).append(p)
                engine = make_engine(
                    model,
                    torch.optim.SGD([{"params": ps} for ps in kinds.values()], lr=0.0),
                    policy=policy,
                    measure=ada.Measure(estimator=estimator, every=1),
                    global_batch_size=STEP,
                    max_batch_size=STEP + 1,
                    total_samples=STEPS * STEP,
                    seed=5,
                )

                def loss(batch: Any, model: nn.Module = model, weighted: bool = weighted) -> Any:
                    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
                    return ((losses * batch[3]).sum(), batch[3]) if weighted else losses.mean()

                worst = 0.0
                for number, decision in enumerate(train(engine, loss)):
                    rows = order.indices(number * STEP, STEP)
                    parts = [rows[(r - number * STEP) % ranks :: ranks] for r in range(ranks)]
                    if kind == "worker":
                        units = parts
                    else:
                        pieces = [cut(part, estimator.units) for part in parts]
                        units = [torch.cat(together) for together in zip(*pieces, strict=True)]
                    v, vp, s = by_hand(units, weighted)
                    seen = decision.observation.gradient
                    assert seen.num_units == len(units)
                    worst = max(worst, abs(seen.variance_trace / v - 1), abs(seen.grad_norm_sq / s - 1))
                    if kind == "products":
                        worst = max(worst, abs(seen.inner_product_variance / vp - 1))
                found[shard, kind, weighted] = worst
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_units_of_a_sharded_model(ranks: int) -> None:
    for found in on_ranks(ranks, measured, ranks):
        assert len(found) == (24 if ranks > 1 else 16)
        assert max(found.values()) < 1e-9, found


def refused(rank: int) -> list[str]:
    messages = []
    for policy, estimator in (
        (ada.InnerProductTest(theta=0.9), ada.Worker()),
        (ada.InnerProductTest(theta=0.9), ada.PerExample()),
        (ada.CoordinateNormTest(eta=0.5), ada.MicroBatch()),
        (ada.CoordinateNormTest(eta=0.5), ada.PerExample()),
        (ada.CoordinateNormTest(eta=0.5), ada.Worker()),
        (ada.CoordinateNormTest(eta=0.5), ada.Probe()),
        (ada.InnerProductTest(theta=0.9), ada.Probe()),
        (ada.NormTest(eta=0.5), ada.Probe()),
    ):
        model = make_model()
        sharding.whole(model)
        with pytest.raises(InvalidArgument) as error:
            make_engine(
                model,
                torch.optim.SGD(model.parameters(), lr=0.1),
                policy=policy,
                measure=ada.Measure(estimator=estimator),
                global_batch_size=16,
            )
        messages.append(str(error.value))
    model = make_model()
    sharding.whole(model)
    options = {
        "policy": ada.NormTest(eta=0.5),
        "measure": ada.Measure(estimator=ada.Worker(), every=1),
        "global_batch_size": 12,
        "micro_batch_size": 8,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidArgument) as error:
        make_engine(model, optimizer, **options)
    messages.append(str(error.value))
    engine = make_engine(model, optimizer, max_batch_size=16, **options)
    engine.micro_batch_size = 4  # as after memory has run out
    with pytest.raises(UncoveredParameter) as late:
        train(engine)
    return [*messages, str(late.value)]


def test_what_cannot_be_given_is_said_at_once() -> None:
    coordinates = ["DistributedDataParallel"] * 4
    words = ("MicroBatch", "MicroBatch", *coordinates, "MicroBatch", "PerExample", "max_batch_size must be <= 16")
    words = (*words, "raise micro_batch_size")
    for messages in on_ranks(2, refused):
        for message, word in zip(messages, words, strict=True):
            assert word in message
