"""The companion optimizers under local steps: what has a mean is averaged, what has none stays apart or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument, NonFiniteGradient
from adadagrad.core.optimizing import EVERYTHING, Extrapolating, Reevaluating, RemembersApart
from tests.engine.cases import make_engine, make_model, mean_loss, weights
from tests.engine.cases import train as run
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


class Away(torch.optim.SGD):
    """Plain steps that evaluate their batch a second time, in some of them where nothing is finite."""

    needs_closure = True
    bad: frozenset[int] = frozenset()
    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        closure()
        params = self.param_groups[0]["params"]
        own, kept = [p.grad for p in params], params[0].detach().clone()
        try:
            with torch.no_grad():
                params[0].fill_(float("nan") if self.calls in self.bad else 0.5)
            closure()
        finally:
            with torch.no_grad():
                params[0].copy_(kept)
        for p, grad in zip(params, own, strict=True):
            p.grad = grad
        super().step()


def away(bad: set[int], on_nonfinite: str = "skip") -> Any:
    model = make_model()
    optimizer = Away(model.parameters(), lr=0.05)
    optimizer.bad = frozenset(bad)
    return make_engine(
        model, optimizer, policy=ada.ConstantBatch(12), parallel=ada.LocalSGD(model, optimizer, 3), replay=True,
        total_samples=108, seed=3, on_nonfinite=on_nonfinite,
    )  # fmt: skip


def left_out(rank: int, step: int) -> Any:
    """Rank 1 leaves out one update, in the middle of a round or where it ends."""
    engine = away({step} if rank else set())
    found = [decision.samples_seen for decision in run(engine)]
    with pytest.raises(NonFiniteGradient, match="1 local updates before "):
        run(away({step} if rank else set(), "stop"))
    with pytest.raises(NonFiniteGradient, match=r"4 local updates before step 51 .*ends after 50 in a row on all"):
        run(away(set(range(1, 1000))))
    return found, engine.skipped, weights(engine.model)


@pytest.mark.parametrize("step", [2, 3, 9])
def test_a_rank_whose_second_evaluation_is_not_finite_leaves_out_its_own_update(step: int) -> None:
    """Rank 1's 6 examples are taken off where the ranks meet, and nobody waits for it."""
    (seen, skipped, ours), (other, _, theirs) = on_ranks(2, left_out, step)
    expected = [12 * k - 6 * (k >= (step + 2) // 3 * 3) for k in range(1, 10)]
    assert seen == other == [*expected, 108]
    assert skipped == 1
    assert torch.equal(ours, theirs)
