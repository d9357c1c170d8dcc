"""AdaRankGrad against Adam and momentum SGD where it equals them, and its choice of rank against the SVD."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers import AdaRankGrad, adarankgrad
from adadagrad.optimizers.moment_transfer import transfer
from adadagrad.optimizers.range_finder import Subspace, find_subspace
from tests.parallel.sharding import whole
from tests.ranks import on_ranks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator(seed), dtype=torch.float64)).Q


def low_rank(m: int, n: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    left, right = (torch.randn(size, rank, generator=generator(seed + i), dtype=dtype) for i, size in enumerate((m, n)))
    return left @ right.T


def slope(param: Tensor, t: int) -> Tensor:
    """Gradient of a noisy quadratic."""
    return 2 * param.detach() + torch.randn(param.shape, generator=generator(50 + t), dtype=param.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for t in steps:
        for p in params:
            p.grad = slope(p, t)
        optimizer.step()


SHAPES = [(4, 6), (6, 4), (5,), (5, 5)]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(s, generator=generator(), dtype=torch.float64)) for s in SHAPES]


def test_at_full_rank_it_is_adam() -> None:
    params, others = parameters(), parameters()
    options: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    ours = AdaRankGrad(params, **options, max_rank=9, min_rank=9, scale=1.0, max_inner_steps=4)
    train(ours, params, range(20))
    train(torch.optim.AdamW(others, **options), others, range(20))
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert ours.ranks() == {"0": 4, "1": 4, "3": 5}


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3, 4]])
def test_with_momentum_any_basis_is_dense_momentum(seeds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that changes: R is orthogonal, and so nothing is lost. Adam is not so: it depends on the axes."""
    turns = itertools.cycle(seeds)

    def some_basis(matrix: Tensor, size: int, **_: Any) -> Subspace:
        return Subspace(orthogonal(len(matrix), next(turns)), torch.ones(size + 1, dtype=matrix.dtype))

    monkeypatch.setattr(adarankgrad, "find_subspace", some_basis)
    monkeypatch.setattr(torch, "eye", lambda n, **_: orthogonal(n, next(turns)))
    params, others = parameters()[:1], parameters()[:1]
    options: dict[str, Any] = {"max_rank": 4, "min_rank": 4, "scale": 1.0, "max_inner_steps": 3}
    train(AdaRankGrad(params, lr=0.02, rule="momentum", **options), params, range(11))
    train(torch.optim.SGD(others, lr=0.02, momentum=0.9), others, range(11))
    torch.testing.assert_close(params[0], others[0], rtol=1e-10, atol=1e-12)
    adam, dense = parameters()[:1], parameters()[:1]
    train(AdaRankGrad(adam, lr=0.02, **options), adam, range(11))
    train(torch.optim.Adam(dense, lr=0.02), dense, range(11))
    assert float((adam[0] - dense[0]).detach().abs().max()) > 1e-3


def reference(param: Tensor, basis: Tensor, steps: int, lr: float, scale: float) -> Tensor:
    """Adam on Q^T G with a fixed Q, in plain torch; the matrix is wide."""
    x, m, v = param.detach().clone(), torch.zeros(()), torch.zeros(())
    for t in range(1, steps + 1):
        g = basis.T @ slope(x, t - 1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - lr * scale * basis @ (m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    return x


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_in_a_fixed_subspace_it_is_adam_on_the_projected_gradient(shape: tuple[int, int]) -> None:
    param = nn.Parameter(torch.randn(shape, generator=generator(), dtype=torch.float64))
    start = param.detach().clone()
    optimizer = AdaRankGrad([param], lr=0.05, max_rank=2, min_rank=2, scale=0.5, switch_tolerance=0)
    for t in range(6):
        grad = slope(param if shape[0] < shape[1] else param.T, t)
        param.grad = grad if shape[0] < shape[1] else grad.T
        optimizer.step()
    basis = optimizer.state[param]["basis"]
    wide = start if shape[0] < shape[1] else start.T
    expected = reference(wide, basis, 6, 0.05, 0.5)
    found = param.detach() if shape[0] < shape[1] else param.detach().T
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_rank_of_an_exactly_low_rank_gradient_is_found() -> None:
    for rank in (1, 3, 5):
        matrix = low_rank(12, 30, rank)
        found = find_subspace(matrix, 9, power_iterations=0, generator=generator(7))
        assert found is not None
        assert float(found.residuals[rank]) <= 1e-12
        assert found.rank(1e-10, 1, 9) == rank
        torch.testing.assert_close(found.basis @ found.basis.T @ matrix, matrix, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bound", [0.3, 0.04, 0.001])
def test_chosen_rank_is_that_of_the_exact_spectrum(bound: float) -> None:
    """Singular values 2^-i; a sketch may take a few columns more, never fewer than the best possible."""
    values = 2.0 ** -torch.arange(16, dtype=torch.float64)
    matrix = orthogonal(16, 1) @ torch.diag(values) @ orthogonal(16, 2)
    tails = 1 - values.square().cumsum(0) / values.square().sum()
    exact = int((tails <= bound).nonzero()[0]) + 1
    for seed in range(20):
        found = find_subspace(matrix, 12, power_iterations=0, generator=generator(seed))
        assert found is not None
        assert exact <= found.rank(bound, 1, 12) <= exact + 1
        r = found.rank(bound, 1, 12)
        left = matrix - found.basis[:, :r] @ found.basis[:, :r].T @ matrix
        assert float(found.residuals[r]) == pytest.approx(float(left.square().sum() / matrix.square().sum()), abs=1e-9)
    turned = find_subspace(matrix, 12, power_iterations=2, generator=generator(3))
    assert turned is not None
    assert turned.rank(bound, 1, 12) == exact


def test_error_of_the_sketch_keeps_the_known_bound() -> None:
    """Halko, Martinsson, Tropp: mean error <= sqrt(1 + k/(p - 1)) times the tail, for k columns and p more."""
    k, p = 4, 4
    values = 2.0 ** -torch.arange(20, dtype=torch.float64)
    matrix = orthogonal(20, 1) @ torch.diag(values) @ orthogonal(20, 2)
    errors = []
    for seed in range(50):
        found = find_subspace(matrix, k + p, power_iterations=0, generator=generator(seed))
        assert found is not None
        errors.append(float(torch.linalg.matrix_norm(matrix - found.basis @ found.basis.T @ matrix)))
    tail = float(values[k:].square().sum().sqrt())
    assert sum(errors) / len(errors) <= math.sqrt(1 + k / (p - 1)) * tail


@pytest.mark.parametrize("kind", ["squared", "ldadam"])
def test_second_moment_stays_non_negative_where_the_printed_map_does_not(kind: str) -> None:
    old, new = orthogonal(8, 1)[:, :4], orthogonal(8, 2)[:, :3]
    change = new.T @ old
    mean = torch.randn(4, 10, generator=generator(), dtype=torch.float64)
    square = mean.square() + torch.rand(4, 10, generator=generator(1), dtype=torch.float64)
    assert float((change @ square).min()) < -0.1  # R V, as printed
    state = {"exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
    transfer(state, change, kind, (0.9, 0.999), 10)
    assert float(state["exp_avg_sq"].min()) >= 0
    torch.testing.assert_close(state["exp_avg"], change @ mean)
    if kind == "squared":
        for i in range(3):
            for j in range(10):
                expected = sum(float(change[i, k]) ** 2 * float(square[k, j]) for k in range(4))
                assert float(state["exp_avg_sq"][i, j]) == pytest.approx(expected, rel=1e-12)
    else:
        b1, b2 = 1 - 0.9**10, 1 - 0.999**10
        hat, variance = mean / b1, square / b2 - (mean / b1) ** 2
        expected_square = ((change**2) @ variance + (change @ hat) ** 2).clamp(min=0) * b2
        torch.testing.assert_close(state["exp_avg_sq"], expected_square, rtol=1e-12, atol=1e-14)


def test_a_switch_within_the_same_span_keeps_the_moments() -> None:
    old = orthogonal(8, 1)[:, :3]
    turn = orthogonal(3, 2)
    mean, square = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    state = {"exp_avg": mean.clone(), "exp_avg_sq": square.clone()}
    transfer(state, (old @ turn).T @ old, "squared", (0.9, 0.999), 3)
    torch.testing.assert_close(old @ turn @ state["exp_avg"], old @ mean)
    signs = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, -1]]).double()  # permuted and turned round
    state = {"exp_avg": mean.clone(), "exp_avg_sq": torch.full((3, 5), 0.7, dtype=torch.float64)}
    transfer(state, signs.T, "squared", (0.9, 0.999), 3)
    assert torch.equal(state["exp_avg_sq"], torch.full((3, 5), 0.7, dtype=torch.float64))
    assert torch.equal(state["exp_avg"], signs.T @ mean)


def falling(t: int) -> Tensor:
    """Gradients whose rank falls from 6 to 1."""
    return low_rank(16, 24, max(1, 6 - t // 4), seed=t, dtype=torch.float32)


def test_rank_falls_never_grows_and_the_memory_goes_with_it() -> None:
    param = nn.Parameter(torch.zeros(16, 24))
    optimizer = AdaRankGrad([("w", param)], max_rank=8, max_inner_steps=2, max_residual_energy=1e-4)
    ranks, sizes = [], []
    for t in range(40):
        param.grad = falling(t)
        optimizer.step()
        rank = optimizer.ranks()["w"]
        state = optimizer.state[param]
        ranks.append(rank)
        assert state["exp_avg"].untyped_storage().nbytes() == 4 * rank * 24
        assert state["exp_avg_sq"].untyped_storage().nbytes() == 4 * rank * 24
        assert state["basis"].untyped_storage().nbytes() == 4 * rank * 16
        sizes.append(optimizer.state_bytes()["current"])
        assert sizes[-1] == 4 * (rank * 16 + 2 * rank * 24) + 4 * 4 + 1  # step, two norms, count and a flag
        assert bool((state["exp_avg_sq"] >= 0).all())
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 6
    assert ranks[-1] == 1
    memory = optimizer.state_bytes()
    assert memory["peak"] == max(sizes)
    assert memory["peak_in_switch"] > memory["peak"]
    first = optimizer.switch_log[0]
    assert (first.step, first.parameter, first.old_rank, first.new_rank, first.reason) == (1, "w", 0, 6, "first")
    news = [switch.new_rank for switch in optimizer.switch_log]
    assert news == sorted(news, reverse=True)
    assert all(s.reason == "cap" for s in list(optimizer.switch_log)[1:])


def test_rank_may_grow_where_that_is_allowed() -> None:
    found = {}
    for monotone in (True, False):
        param = nn.Parameter(torch.zeros(16, 24))
        optimizer = AdaRankGrad(
            [param], max_rank=8, max_inner_steps=1, max_residual_energy=1e-4, monotone_rank=monotone
        )
        for rank in (2, 5):
            param.grad = low_rank(16, 24, rank, dtype=torch.float32)
            optimizer.step()
        found[monotone] = optimizer.ranks()["0"]
    assert found == {True: 2, False: 5}


def test_switches_when_the_projected_gradient_has_fallen() -> None:
    param = nn.Parameter(torch.zeros(4, 6).double())
    optimizer = AdaRankGrad([param], max_rank=1, switch_tolerance=0.5, switch_smoothing=0.5, max_inner_steps=100)
    matrix, switches = low_rank(4, 6, 1), []
    for t in range(12):
        param.grad = matrix * 0.7**t
        optimizer.step()
        switches.append(len(optimizer.switch_log))
    average, entry, expected = 0.0, 0.0, []
    for t in range(12):
        norm = 0.7**t
        if t == 0 or average <= 0.5 * entry:
            average = entry = norm
            expected.append((expected[-1] if expected else 0) + 1)
        else:
            average = 0.5 * average + 0.5 * norm
            expected.append(expected[-1])
    assert switches == expected
    assert {s.reason for s in list(optimizer.switch_log)[1:]} == {"tolerance"}


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_gradient_that_shows_nothing_does_not_end_the_run(bad: float) -> None:
    """At first, and at a switch; the subspace is found at the next gradient."""
    param = nn.Parameter(torch.zeros(6, 8))
    optimizer = AdaRankGrad([param], max_rank=3, max_residual_energy=1e-4, max_inner_steps=2, rule="momentum")
    for t in range(8):
        good = t not in (0, 4)
        param.grad = low_rank(6, 8, 2, dtype=torch.float32) if good else torch.full((6, 8), bad)
        if bad != 0 and not good:
            continue  # which the engine leaves out
        optimizer.step()
    assert optimizer.ranks()["0"] == 2
    found = find_subspace(torch.full((6, 8), bad), 3, power_iterations=0, generator=generator())
    assert found is None


def test_the_state_goes_on_bit_for_bit_across_a_change_of_rank() -> None:
    one, two = nn.Parameter(torch.zeros(16, 24)), nn.Parameter(torch.zeros(16, 24))
    options: dict[str, Any] = {"max_rank": 8, "max_inner_steps": 2, "max_residual_energy": 1e-4}
    first, second = AdaRankGrad([one], **options), AdaRankGrad([two], **options)
    for t in range(9):
        one.grad = falling(t)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        two.copy_(one)
    before = first.ranks()["0"]
    for t in range(9, 30):
        for param, optimizer in ((one, first), (two, second)):
            param.grad = falling(t)
            optimizer.step()
        assert torch.equal(one, two)
    assert first.ranks()["0"] < before
    assert second.state_bytes() == first.state_bytes()
    length = len(first.switch_log)
    first.load_state_dict(first.state_dict())
    assert len(first.switch_log) == length > 1  # only copies begin a new one


OPTIONS: list[dict[str, Any]] = [
    {"min_rank": 2},
    {"max_residual_energy": 0.9},
    {"switch_tolerance": 0.99},
    {"switch_tolerance": 0.95, "switch_smoothing": 0.1},
    {"max_inner_steps": 1},
    {"oversample": 0},
    {"power_iterations": 2},
    {"monotone_rank": False},
    {"second_moment_map": "ldadam"},
    {"second_moment_map": "none"},
    {"seed": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_changes_something(options: dict[str, Any]) -> None:
    found = []
    base: dict[str, Any] = {"max_rank": 3, "max_inner_steps": 3, "max_residual_energy": 0.3}
    if "switch_smoothing" in options:
        base["switch_tolerance"] = options["switch_tolerance"]
    for more in ({}, options):
        param = nn.Parameter(torch.randn(6, 9, generator=generator(), dtype=torch.float64))
        optimizer = AdaRankGrad([param], lr=0.05, **(base | more))
        for t in range(12):
            param.grad = slope(param, t) * 0.9**t
            if t < 5 and "max_residual_energy" not in options:
                param.grad = param.grad + 20 * low_rank(6, 9, 1)
            optimizer.step()
        found.append(param.detach().clone())
    assert not torch.equal(*found)


def test_half_precision_keeps_float32_moments() -> None:
    param = nn.Parameter(torch.zeros(6, 8, dtype=torch.bfloat16))
    optimizer = AdaRankGrad([param], max_rank=3)
    for _ in range(3):
        param.grad = low_rank(6, 8, 2, dtype=torch.float32).bfloat16()
        optimizer.step()
    assert {optimizer.state[param][n].dtype for n in ("basis", "exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank": 0}, "max_rank must be >= 1"),
        ({"min_rank": 5, "max_rank": 4}, "min_rank must be <= max_rank, got 5 and 4"),
        ({"max_residual_energy": 1.5}, "max_residual_energy must be between 0 and 1"),
        ({"scale": -1.0}, "scale must be >= 0"),
        ({"switch_tolerance": 2.0}, "switch_tolerance must be between 0 and 1"),
        ({"switch_smoothing": 1.0}, "switch_smoothing must be >= 0 and below 1"),
        ({"max_inner_steps": 0}, "max_inner_steps must be >= 1"),
        ({"oversample": -1}, "oversample must be >= 0"),
        ({"power_iterations": 1.0}, "power_iterations must be an integer"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"rule": "sgd"}, "unknown rule"),
        ({"second_moment_map": "signed"}, "unknown second_moment_map"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"eps": 0.0}, "eps must be > 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        AdaRankGrad(parameters(), **options)


def refused(rank: int) -> str:
    model = nn.Sequential(nn.Linear(4, 4))
    whole(model)
    with pytest.raises(InvalidArgument) as caught:
        AdaRankGrad(model.parameters(), max_rank=2)
    return str(caught.value)


def test_sharded_matrices_are_refused() -> None:
    for message in on_ranks(2, refused):
        assert "AdaRankGrad needs whole matrices, and parameter 0 of its group" in message
        assert "use DistributedDataParallel" in message
