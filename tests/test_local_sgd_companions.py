"""The companion optimizers under local steps: what has a mean is averaged, what has none stays apart or is refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.optimizing import EVERYTHING, Extrapolating, Reevaluating, RemembersApart
from tests.engine.cases import make_engine, make_model, mean_loss, weights
from tests.optimizers.cases import CASES
from tests.ranks import on_ranks


def differs(tensor: Tensor) -> bool:
    """Whether a tensor is another one on the other rank."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return not torch.equal(*found)


def train(case: Any, state: str) -> tuple[nn.Module, torch.optim.Optimizer, float, float]:
    model = make_model()
    more = {"rate": 0.3} if case.name == "SIFT" else {}
    optimizer = case.build(model.parameters(), lr=0.1 * case.lr, **more)
    parallel = ada.LocalSGD(model, optimizer, 3, optimizer_state=state)  # type: ignore[arg-type]
    again = isinstance(optimizer, Reevaluating) and optimizer.needs_closure
    engine = make_engine(
        model, optimizer, policy=ada.ConstantBatch(24), parallel=parallel, replay=again, total_samples=24 * 30, seed=3
    )
    losses = []
    for step in engine:
        step.run(mean_loss(model))
        losses.append(step.update().observation.loss)
    return model, optimizer, sum(losses[:5]), sum(losses[-5:])


def of_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in CASES:
        try:
            model, optimizer, first, last = train(case, "average")
        except InvalidArgument as error:
            found[f"{case.name} refused"] = str(error)
            for state in ("local", "reset"):
                model, optimizer, first, last = train(case, state)
                found[f"{case.name} {state}"] = (weights(model), first, last)
            continue
        found[f"{case.name} average"] = (weights(model), first, last)
        entries = [name for s in optimizer.state.values() for name in s]
        apart = {
            name: any(
                differs(s[name]) for s in optimizer.state.values() if isinstance(s.get(name), Tensor) and s[name].dim()
            )
            for name in dict.fromkeys(entries)
        }
        found[f"{case.name} apart"] = sorted(name for name, value in apart.items() if value)
        found[f"{case.name} own"] = isinstance(optimizer, Extrapolating) and optimizer.own_state
    return found


def test_ranks_meet_with_one_model_and_what_has_a_mean() -> None:
    one, two = on_ranks(2, of_rank)
    assert sum(name.endswith("refused") for name in one) == 2
    for name in one:
        if name.endswith(("average", "local", "reset")):
            (ours, first, last), (theirs, _, _) = one[name], two[name]
            assert torch.equal(ours, theirs), name
            assert last < first, name
        elif name.endswith("refused"):
            assert 'whose state has no mean over ranks: use "local" or "reset"' in one[name]
        elif name.endswith("apart"):
            own = one[name.replace("apart", "own")]
            assert one[name] == (["local_gradient"] if own else []), name


def test_what_has_no_mean_is_said_by_the_optimizer() -> None:
    for case in CASES:
        optimizer = case.build(make_model().parameters())
        assert isinstance(optimizer, RemembersApart)
        assert (EVERYTHING in optimizer.no_mean) == (case.name in ("SIFT", "AdaRankGrad"))
    assert not isinstance(torch.optim.SGD(make_model().parameters(), lr=0.1), RemembersApart)
