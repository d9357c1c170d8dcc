"""The noise that is measured where the ranks of local steps meet, beside the definition; and what is decided of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adadagrad as ada
from adadagrad.batching import SampleOrder
from tests.engine.cases import make_data, make_engine, make_model, mean_loss, train, weights
from tests.ranks import on_ranks
from tests.test_local_sgd import OPTIMIZERS, local


def gradient_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    data = make_data()
    loss = F.cross_entropy(model(data.tensors[0][rows]), data.tensors[1][rows])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def noise(rank: int, b: int) -> Any:
    """Every measured number beside the definition, on the gradients of the round's last step."""
    found = []
    order = SampleOrder(203, seed=3)
    for estimator in (ada.Worker(), ada.PerExample(), ada.MicroBatch(units=2)):
        engine = local(
            3,
            policy=ada.NormTest(eta=0.5),
            measure=ada.Measure(estimator=estimator, every=1, max_examples=None),
            global_batch_size=b,
            max_batch_size=b,
            min_batch_size=b,
            bounds=ada.Bounds(monotone=False),
            total_samples=6 * b,
        )
        for number, step in enumerate(engine):
            before = copy.deepcopy(engine.model)
            step.run(mean_loss(engine.model))
            seen = step.update().observation.gradient
            assert (seen is None) == (number % 3 < 2)
            if seen is None:
                continue
            rows = order.indices(b * number, b)
            mine = rows[(rank - b * number) % 2 :: 2]
            own = gradient_of(before, mine)
            sizes, grads = [None, None], [None, None]
            dist.all_gather_object(sizes, len(mine))
            dist.all_gather_object(grads, own)
            mean = sum(n * g for n, g in zip(sizes, grads, strict=True)) / b
            if isinstance(estimator, ada.Worker):
                v = sum(n * float((g - mean).square().sum()) for n, g in zip(sizes, grads, strict=True))
            else:
                half = [mine[: -(-len(mine) // 2)], mine[-(-len(mine) // 2) :]]
                units = [mine[i : i + 1] for i in range(len(mine))] if isinstance(estimator, ada.PerExample) else half
                inside = sum(len(u) * float((gradient_of(before, u) - own).square().sum()) for u in units)
                parts = [None, None]
                dist.all_gather_object(parts, (inside, len(units) - 1))
                v = sum(p[0] for p in parts) / sum(p[1] for p in parts)
            s = float(mean.square().sum())
            found.append((seen.variance_trace / v - 1, seen.grad_norm_sq / s - 1, seen.num_examples == b))
    return found


@pytest.mark.parametrize("b", [12, 13])
def test_noise_is_the_definition(b: int) -> None:
    for found in on_ranks(2, noise, b):
        assert len(found) == 6
        for v, s, size in found:
            assert abs(v) < 1e-10
            assert abs(s) < 1e-10
            assert size


def drifts(rank: int) -> Any:
    """For SGD and one step a round the drifts are the gradients, times the learning rate."""
    pairs = []
    for h in (1, 4):
        own = local(h, policy=ada.NormTest(eta=0.9), _noise="drifts", global_batch_size=12, total_samples=12 * 8)
        other = local(
            h,
            policy=ada.NormTest(eta=0.9),
            global_batch_size=12,
            total_samples=12 * 8,
            measure=ada.Measure(estimator=ada.Worker(), every=1),
            bounds=ada.Bounds(monotone=False),
        )
        first = [next(d for d in train(engine) if d.observation.gradient) for engine in (own, other)]
        pairs.append([
            (d.step, d.requested, d.observation.gradient.kind, d.observation.gradient.noise_scale) for d in first
        ])
    return pairs


def test_drifts() -> None:
    found = on_ranks(2, drifts)
    assert found[0] == found[1]
    (one, gradients), (four, other) = found[0]
    assert (one[0], four[0], other[0]) == (1, 4, 4)
    assert one[2] == four[2] == "drift"
    assert one[1] == pytest.approx(gradients[1], rel=1e-9)
    assert one[3] == pytest.approx(gradients[3], rel=1e-9)
    assert 0.2 < four[1] / other[1] < 5  # one estimate with one degree of freedom beside another


def trace(rank: int) -> Any:
    """A test that grows the batch, with momentum, at the default settings: every rank decides the same."""
    engine = local(
        lambda seen: 2 if seen < 300 else 5,
        OPTIMIZERS["momentum"],
        ada.NormTest(eta=0.4),
        total_samples=1_500,
        max_batch_size=64,
    )
    decisions = train(engine)
    return [(d.step, d.samples_seen, d.plan.global_batch_size, d.reason) for d in decisions], weights(engine.model)


def test_all_ranks_decide_the_same_at_meetings_only() -> None:
    (first, w), (second, other) = on_ranks(2, trace)
    assert first == second
    assert torch.equal(w, other)
    sizes = [size for _, _, size, _ in first]
    assert sizes[-2] > sizes[0]
    decided = [step for step, _, _, reason in first if reason != "local step"]
    assert decided[:3] == [2, 4, 6]
    changed = [step for step, before, after in zip(range(1, 99), sizes, sizes[1:], strict=False) if before != after]
    assert set(changed) <= set(decided)


def with_weights(rank: int) -> Any:
    """After one local step the mean gradient is that of DistributedDataParallel, weights of examples included."""
    found = []
    for estimator in (ada.Worker(), ada.PerExample(), ada.MicroBatch(units=2)):
        squares = []
        for apart in (True, False):
            options: dict[str, Any] = {
                "policy": ada.NormTest(eta=0.5),
                "measure": ada.Measure(estimator=estimator, every=1, max_examples=None),
                "global_batch_size": 13,
                "total_samples": 52,
            }
            model = make_model()
            if apart:
                engine = local(1, model=model, **options)
            else:
                optimizer = OPTIMIZERS["sgd"](model.parameters())
                engine = make_engine(DistributedDataParallel(model), optimizer, seed=3, **options)

            def loss(batch: Any, engine: Any = engine) -> Any:
                rows = F.cross_entropy(engine.model(batch[0]), batch[1], reduction="none")
                return (rows * batch[3]).sum(), batch[3]

            seen = train(engine, loss, steps=1)[0].observation.gradient
            squares.append((seen.grad_norm_sq, seen.variance_trace, seen.weight_sq_sum))
        found.append(squares)
    return found


def test_weights_enter_the_mean_gradient() -> None:
    for found in on_ranks(2, with_weights):
        for number, (own, ddp) in enumerate(found):
            assert own[0] == pytest.approx(ddp[0], rel=1e-10)
            assert own[2] == pytest.approx(ddp[2], rel=1e-10)
            assert number > 0 or own[1] == pytest.approx(ddp[1], rel=1e-10)  # of Worker


def weighted_drifts(rank: int) -> Any:
    """Two local steps of 6 and 5 examples a rank, whose weights differ from rank to rank."""
    model = nn.Linear(3, 1, bias=False).double()
    parallel = ada.LocalSGD(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, noise="drifts")
    seen = None
    for number in (1, 2):
        parallel.begin_step(number, 0)
        with torch.no_grad():
            model.weight += torch.tensor([[1.0, 2.0, -1.0], [3.0, 1.0, 0.5]][rank]).double()
        seen = parallel.after_update(6 - rank, [4.0, 20.0][rank])
    return seen


def test_weights_enter_the_drifts_as_they_enter_the_mean() -> None:
    moved = torch.tensor([[1.0, 2.0, -1.0], [3.0, 1.0, 0.5]])  # a local step, on average
    weights = torch.tensor([4.0, 20.0]) / 24.0
    mean = weights @ moved
    for seen in on_ranks(2, weighted_drifts):
        assert seen.num_examples == 11
        assert seen.grad_norm_sq == pytest.approx(float(mean @ mean))
        assert seen.variance_trace == pytest.approx(22 * float(weights @ (moved - mean).square().sum(1)))
