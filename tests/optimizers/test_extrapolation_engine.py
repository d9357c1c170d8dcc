"""The extrapolating optimizers under the engine: its windows, corrections and checkpoints, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers.extrapolated_adam import ExtrapolatedAdam
from adadagrad.optimizers.extrapolated_sgd import ExtrapolatedSGD
from tests.engine.cases import Sizes
from tests.ranks import on_two_ranks

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (ExtrapolatedSGD, {}),
    (ExtrapolatedSGD, {"perturb": "filter"}),
    (ExtrapolatedSGD, {"perturb": "past_global"}),
    (ExtrapolatedAdam, {}),
    (ExtrapolatedAdam, {"direction": "grad"}),
]


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(64, 5, generator=generator).double(), torch.randint(0, 3, (64,), generator=generator)
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def build(kind: Any, options: dict[str, Any], wrap: Any = None, **engine: Any) -> ada.AdaptiveBatch:
    model = network()
    wrapped = wrap(model) if wrap else model
    optimizer = kind(model.parameters(), lr=0.05, **options)
    if wrap and optimizer.needs_local_gradients:
        optimizer.keep_local_gradients(wrapped)
    return ada.AdaptiveBatch(
        wrapped, optimizer, dataset(), **{"policy": Sizes(largest=24), "max_batch_size": 24,
        "micro_batch_size": 3, "total_samples": 400, "max_grad_norm": 0.5, **engine},
    )  # fmt: skip


def go(engine: ada.AdaptiveBatch, steps: int) -> list[Tensor]:
    found: list[Tensor] = []
    for step in engine:
        step.run(lambda batch: F.cross_entropy(engine.model(batch[0]), batch[1]))
        step.update()
        found.append(torch.cat([p.detach().flatten() for p in engine.model.parameters()]))
        if len(found) == steps:
            break
    return found


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_micro_batches_do_not_matter(kind: Any, options: dict[str, Any]) -> None:
    """What is remembered is corrected as the gradient is: the split into micro-batches leaves no trace."""
    whole, split = (go(build(kind, options, micro_batch_size=size), 12) for size in (24, 3))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_a_resumed_run_is_the_same(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    engine, other = build(kind, options), build(kind, options)
    go(engine, 5)
    engine.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    for a, b in zip(go(engine, 5), go(other, 5), strict=True):
        assert torch.equal(a, b)


def ranks(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model = network()
    wrapped, unseen = DistributedDataParallel(model), ExtrapolatedSGD(model.parameters())
    with pytest.raises(InvalidArgument) as caught:
        ada.AdaptiveBatch(wrapped, unseen, dataset(), policy=Sizes(), max_batch_size=24, total_samples=100)
    found["refused"] = str(caught.value)
    for index, (kind, options) in enumerate(KINDS):
        split = go(build(kind, options, DistributedDataParallel), 8)
        whole = go(build(kind, options, DistributedDataParallel, micro_batch_size=24), 8)
        state = [s.get("local_gradient") for s in build_state(kind, options)]
        found[index] = split, whole, state
    return found


def build_state(kind: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    engine = build(kind, options, DistributedDataParallel)
    go(engine, 3)
    return list(engine.optimizer.state.values())


def test_on_two_ranks() -> None:
    one, two = on_two_ranks(ranks)
    assert "keep_local_gradients(model)" in one["refused"]
    for index, (_, options) in enumerate(KINDS):
        split, whole, state = one[index]
        others, _, other_state = two[index]
        assert all(torch.equal(a, b) for a, b in zip(split, others, strict=True))
        for a, b in zip(split, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        local = index == 0 or options.get("direction") == "grad"
        for a, b in zip(state, other_state, strict=True):
            assert (a is not None) == local
            assert not local or not torch.allclose(a, b)
