"""AdaRankGrad where a gradient shows nothing, is of extreme size, or of few examples, and where ranks train apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers import AdaRankGrad
from adadagrad.optimizers.range_finder import find_subspace
from tests.engine.cases import make_engine, make_model, train, weights
from tests.optimizers.test_adarankgrad import generator, low_rank, orthogonal, slope
from tests.ranks import on_ranks


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e18, 1e30])
def test_the_size_of_a_gradient_does_not_matter(scale: float) -> None:
    matrix = low_rank(12, 20, 3, dtype=torch.float32)
    found, scaled = (find_subspace(g, 6, power_iterations=1, generator=generator(1)) for g in (matrix, matrix * scale))
    assert found is not None
    assert scaled is not None
    torch.testing.assert_close(scaled.residuals, found.residuals, rtol=0, atol=1e-5)
    assert scaled.rank(1e-4, 1, 6) == 3
    torch.testing.assert_close(scaled.basis[:, :3].abs(), found.basis[:, :3].abs(), rtol=0, atol=1e-4)


def raising(error: Exception) -> Any:
    def svd(*_: Any, **__: Any) -> None:
        raise error

    return svd


def test_a_decomposition_that_fails_is_tried_again_and_lack_of_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.zeros(6, 8))
    optimizer = AdaRankGrad([param], max_rank=3, max_residual_energy=1e-4, max_inner_steps=1)
    param.grad = low_rank(6, 8, 2, dtype=torch.float32)
    optimizer.step()
    basis = optimizer.state[param]["basis"].clone()
    param.grad = low_rank(6, 8, 2, seed=5, dtype=torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "svd", raising(torch.linalg.LinAlgError("did not converge")))
        optimizer.step()
    assert torch.equal(optimizer.state[param]["basis"], basis)
    assert len(optimizer.switch_log) == 1
    optimizer.step()
    assert not torch.equal(optimizer.state[param]["basis"], basis)
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "svd", raising(torch.OutOfMemoryError("no more")))
        with pytest.raises(torch.OutOfMemoryError, match="no more"):
            optimizer.step()


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_bad_gradient_at_a_switch_keeps_the_subspace(bad: float) -> None:
    param = nn.Parameter(torch.zeros(6, 8))
    optimizer = AdaRankGrad([param], max_rank=3, max_residual_energy=1e-4, max_inner_steps=1)
    param.grad = low_rank(6, 8, 2, dtype=torch.float32)
    optimizer.step()
    basis = optimizer.state[param]["basis"].clone()
    param.grad = torch.full((6, 8), bad)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["basis"], basis)
    assert bool(optimizer.state[param]["exp_avg"].isfinite().all()) == (bad == 0)
    first = AdaRankGrad([nn.Parameter(torch.zeros(6, 8))], max_rank=3, min_rank=2)
    (other,) = first.param_groups[0]["params"]
    other.grad = torch.full((6, 8), bad)
    first.step()
    assert torch.equal(first.state[other]["basis"], torch.eye(6, 2))


def test_asking_for_ranks_makes_no_state() -> None:
    optimizer = AdaRankGrad([nn.Parameter(torch.zeros(4, 5))], max_rank=2)
    assert optimizer.ranks() == {}
    assert optimizer.state_dict()["state"] == {}
    assert optimizer.state_bytes() == {"current": 0, "peak": 0, "peak_in_switch": 0}


@pytest.mark.parametrize(("options", "rank"), [({}, 1), ({"monotone_rank": False}, 8), ({"min_rank": 6}, 6)])
def test_a_first_batch_of_one_example_decides_the_rank_for_good(options: dict[str, Any], rank: int) -> None:
    """As the class warns: unless the rank may grow, or is kept from the start."""
    layer = nn.Linear(16, 16, bias=False)
    optimizer = AdaRankGrad(layer.parameters(), max_rank=8, max_inner_steps=2, **options)
    for t in range(8):
        x = torch.randn(1 if t < 2 else 64, 16, generator=generator(t))
        optimizer.zero_grad()
        (layer(x) - x.flip(1)).square().sum().backward()
        optimizer.step()
    assert optimizer.ranks() == {"0": rank}


def test_vectors_and_groups_without_a_rank_are_plain_momentum_or_adam() -> None:
    shapes = [(5,), (2, 3, 2), (3, 4)]
    for rule, plain in (
        ("momentum", lambda ps: torch.optim.SGD(ps, lr=0.03, momentum=0.9)),
        ("adam", lambda ps: torch.optim.Adam(ps, lr=0.03)),
    ):
        mine, others = ([nn.Parameter(torch.ones(s, dtype=torch.float64)) for s in shapes] for _ in range(2))
        ours = AdaRankGrad(
            [{"params": mine[:2]}, {"params": mine[2:], "max_rank": None}], lr=0.03, max_rank=2, rule=rule
        )
        theirs = plain(others)
        for t in range(7):
            for p in (*mine, *others):
                p.grad = slope(p, t)
            ours.step()
            theirs.step()
        for a, b in zip(mine, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert ours.ranks() == {}


def test_updates_in_directions_new_late_in_a_run_are_up_to_6_6_times_as_long() -> None:
    """The first moment forgets sooner than the second: (1 - 0.9^k) / sqrt(1 - 0.999^k) is 6.57 at k = 12."""
    param = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = AdaRankGrad([param], lr=1.0, scale=1.0, max_rank=1, switch_tolerance=0, max_inner_steps=10**6)
    axes = torch.eye(4, dtype=torch.float64)

    def step(axis: int) -> Tensor:
        before = param.detach().clone()
        param.grad = torch.outer(axes[axis], torch.ones(6, dtype=torch.float64))
        optimizer.step()
        return (param.detach() - before)[axis].abs().max()

    step(0)
    optimizer.state[param]["step"].fill_(1e5)
    optimizer.state[param]["inner_steps"].fill_(1e6)
    sizes = [float(step(1)) for _ in range(40)]
    longest = max((1 - 0.9**k) / math.sqrt(1 - 0.999**k) for k in range(1, 41))
    assert max(sizes) == pytest.approx(longest, rel=1e-6)
    assert longest == pytest.approx(6.57, abs=0.01)


def test_the_rank_may_fall_with_moments_left_as_they_are() -> None:
    """`second_moment_map="none"`: the first rows stay; with rows below them where the rank grows."""
    param = nn.Parameter(torch.zeros(8, 9, dtype=torch.float64))
    optimizer = AdaRankGrad(
        [param], max_rank=4, max_inner_steps=1, max_residual_energy=1e-9, monotone_rank=False, second_moment_map="none"
    )
    found = []
    for rank in (3, 1, 4):
        old = {n: optimizer.state[param].get(n) for n in ("exp_avg", "exp_avg_sq")}
        param.grad = orthogonal(8, 3)[:, :rank] @ torch.ones(rank, 9, dtype=torch.float64).tril()
        optimizer.step()
        state = optimizer.state[param]
        projected = state["basis"].T @ param.grad
        for name, new, beta in (("exp_avg", projected, 0.9), ("exp_avg_sq", projected**2, 0.999)):
            kept, before = torch.zeros_like(state[name]), old[name]
            if before is not None:
                rows = min(len(before), len(kept))
                kept[:rows] = before[:rows]
            torch.testing.assert_close(state[name], beta * kept + (1 - beta) * new, rtol=1e-9, atol=1e-12)
        found.append(optimizer.ranks()["0"])
    assert found == [3, 1, 4]


def apart(rank: int) -> tuple[Any, ...]:
    """Two local steps at a time, each rank in subspaces of its own."""
    model = make_model()
    optimizer = AdaRankGrad(model.parameters(), lr=0.05, max_rank=2, max_inner_steps=3)
    with pytest.raises(InvalidArgument) as refused:
        ada.LocalSGD(model, optimizer)
    with pytest.raises(InvalidArgument, match=r"does not go with SIFT"):
        ada.LocalSGD(model, ada.SIFT(model.parameters(), lr=0.1, free_gradients=False))
    ada.LocalSGD(model, AdaRankGrad(model.parameters()))  # plain Adam, whose state has a mean
    parallel = ada.LocalSGD(model, optimizer, 2, optimizer_state="local")
    train(make_engine(model, optimizer, policy=ada.ConstantBatch(12), parallel=parallel, seed=3))
    (basis, *_) = (state["basis"] for state in optimizer.state.values() if "basis" in state)
    return str(refused.value), basis, weights(model)


def test_ranks_that_train_apart_keep_their_own_subspaces() -> None:
    """The mean of two bases is none."""
    (message, basis, found), (_, other_basis, other_found) = on_ranks(2, apart)
    assert message == (
        'optimizer_state="average" does not go with AdaRankGrad, whose state has no mean over ranks: use "local" or '
        '"reset"'
    )
    assert torch.equal(found, other_found)
    assert not torch.equal(basis, other_basis)
    for q in (basis, other_basis):
        torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1], dtype=q.dtype), rtol=0, atol=1e-6)
