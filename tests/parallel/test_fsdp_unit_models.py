"""Units of sharded models with shared and frozen parameters: the reference's numbers, and those of plain replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.batching import SampleOrder
from adadagrad.core.errors import InvalidMeasurement
from adadagrad.statistics.base import Request
from adadagrad.statistics.worker_instrument import WorkerInstrument
from tests.engine.cases import make_data, make_engine, train
from tests.parallel import sharding
from tests.ranks import on_ranks

STEP, STEPS = 24, 3


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model


MODELS: dict[str, Any] = {
    "tied": tied,
    "frozen": lambda: nn.Sequential(nn.Linear(5, 7).requires_grad_(False), nn.Tanh(), nn.Linear(7, 3)),
    "called twice": lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh(), *[nn.Linear(5, 5)] * 2, nn.Linear(5, 3)),
}
SHARDS = {
    "tied": ("whole", "but_biases"),  # fully_shard cannot cut one parameter in two parts of a model
    "frozen": ("whole", "layers", "one_part", "but_biases"),
    "called twice": ("whole", "layers", "one_part", "but_biases"),
}
KINDS = {
    "norm test on workers": (ada.Worker(), ada.NormTest(eta=100.0)),
    "norm test on micro-batches": (ada.MicroBatch(units=2), ada.NormTest(eta=100.0)),
    "inner products of micro-batches": (ada.MicroBatch(units=3), ada.InnerProductTest(theta=100.0)),
}


def make(name: str) -> nn.Sequential:
    torch.manual_seed(1)
    return MODELS[name]().double()


def engine_for(model: nn.Module, estimator: Any, policy: Any, **options: Any) -> Any:
    """An engine whose optimizer has plain and sharded parameters in groups of their own."""
    kinds: dict[bool, list[Any]] = {}
    for p in model.parameters():
        if p.requires_grad:
            kinds.setdefault(isinstance(p, DTensor), []).append(p)
    rate = options.pop("lr", 0.0)
    return make_engine(
        model,
        torch.optim.SGD([{"params": ps} for ps in kinds.values()], lr=rate),
        policy=policy,
        measure=ada.Measure(estimator=estimator, every=1),
        seed=5,
        **({"global_batch_size": STEP, "max_batch_size": STEP + 1, "total_samples": STEPS * STEP} | options),
    )


def records(rank: int, ranks: int) -> Any:
    """What is measured, by model, way to shard (None for plain replicas) and kind of unit."""
    found = {}
    for name, shards in SHARDS.items():
        for shard in (None, *shards, *(("replicas",) if ranks == 4 and name == "frozen" else ())):
            for kind, (estimator, policy) in KINDS.items():
                model: nn.Module = make(name)
                if shard is None:
                    model = DistributedDataParallel(model)
                else:
                    getattr(sharding, shard)(model)
                decisions = train(engine_for(model, estimator, policy))
                found[name, shard, kind] = [decision.observation.gradient for decision in decisions]
    return found


def units_of(name: str, number: int, ranks: int, kind: str) -> torch.Tensor:
    """(K, d): the mean gradients of a step's units, of equal size."""
    rows = SampleOrder(203, seed=5).indices(number * STEP, STEP)
    parts = [rows[(rank - number * STEP) % ranks :: ranks] for rank in range(ranks)]
    if "micro" in kind:
        pieces = [part.tensor_split(KINDS[kind][0].units) for part in parts]
        parts = [torch.cat(together) for together in zip(*pieces, strict=True)]
    model, (inputs, labels, *_) = make(name), make_data().tensors
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = [F.cross_entropy(model(inputs[part]), labels[part]) for part in parts]
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]) for loss in losses])


def close(value: float, other: float) -> bool:
    return abs(value / other - 1) < 1e-10


@pytest.mark.parametrize("ranks", [2, 4])
def test_units_are_those_of_the_reference_and_of_plain_replicas(ranks: int) -> None:
    results = on_ranks(ranks, records, ranks)
    for (name, shard, kind), seen in results[0].items():
        assert all(other[name, shard, kind] == seen for other in results)
        if shard is None:
            continue
        assert len(seen) == STEPS
        for number, record in enumerate(seen):
            units = units_of(name, number, ranks, kind)
            wanted = ada.statistics_from_units(units, unit_size=STEP // len(units))
            assert record.num_units == len(units)
            assert record.num_examples == STEP
            assert close(record.grad_norm_sq, wanted.grad_norm_sq)
            assert close(record.variance_trace, wanted.variance_trace), (name, shard, kind)
            if "products" in kind:
                assert close(record.inner_product_variance, wanted.inner_product_variance), (name, shard, kind)
            plain = results[0][name, None, kind][number]
            assert close(record.grad_norm_sq, plain.grad_norm_sq)
            if "workers" in kind:  # micro-batches are units of each rank there, and of all ranks together here
                assert close(record.variance_trace, plain.variance_trace), (name, shard, kind)


def trace(rank: int, shard: str | None) -> Any:
    """Batch sizes of a run that trains, from the ranks' gradients."""
    model: nn.Module = make("frozen")
    if shard is None:
        model = DistributedDataParallel(model)
    else:
        getattr(sharding, shard)(model)
    engine = engine_for(
        model,
        ada.Worker(),
        ada.NormTest(eta=0.5),
        lr=0.1,
        micro_batch_size=80,
        max_batch_size=120,
        total_samples=600,
        bounds=ada.Bounds(monotone=False),
        global_batch_size=8,
    )
    return [(d.next_plan.global_batch_size, d.reason) for d in train(engine)]


def traces(rank: int) -> Any:
    return {shard: trace(rank, shard) for shard in (None, "whole", "layers")}


def masked(rank: int, shard: str | None) -> Any:
    """What is measured where only the first micro-batch of each rank weighs anything."""
    model: nn.Module = make("frozen")
    if shard is None:
        model = DistributedDataParallel(model)
    else:
        getattr(sharding, shard)(model)
    engine = engine_for(model, ada.Worker(), ada.NormTest(eta=100.0))
    engine.micro_batch_size = 6
    found = []
    for step in engine:
        calls: list[int] = []

        def loss(batch: Any, calls: list[int] = calls) -> Any:
            weight = torch.full((len(batch[0]),), 0.0 if calls else 1.0).double()
            calls.append(len(batch[0]))
            return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * weight).sum(), weight

        step.run(loss)
        found.append(step.update().observation.gradient)
        assert len(calls) == 2
    return found


def traced_and_masked(rank: int) -> Any:
    return traces(rank), {shard: masked(rank, shard) for shard in (None, "whole", "layers")}


def test_the_same_sizes_as_plain_replicas_and_micro_batches_without_weight() -> None:
    results = on_ranks(2, traced_and_masked)
    sizes, records = results[0]
    assert results[1] == results[0]
    assert len({size for size, _ in sizes[None]}) > 3
    for shard in ("whole", "layers"):
        assert sizes[shard] == sizes[None]
        for record, plain in zip(records[shard], records[None], strict=True):
            assert record.num_units == plain.num_units == 2
            assert record.num_examples == plain.num_examples == STEP // 2
            assert plain.variance_trace > 0
            assert close(record.variance_trace, plain.variance_trace)
            assert close(record.grad_norm_sq, plain.grad_norm_sq)


def test_a_gradient_in_two_parts_is_no_norm() -> None:
    model = nn.Linear(2, 1, bias=False)

    @contextmanager
    def twice(receive: Any) -> Iterator[None]:
        yield
        receive(model.weight, torch.ones(1, 2))
        receive(model.weight, torch.ones(1, 2))

    instrument = WorkerInstrument(model, Request(gradient="sharded", watch=twice))
    with instrument.micro_batch(num_examples=3):
        pass
    with pytest.raises(InvalidMeasurement, match="several backward passes"):
        instrument.finish()
