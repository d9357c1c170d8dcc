"""ExtrapolatedSGD and ExtrapolatedAdam against their equations in plain float64, and against torch's optimizers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.mixing import seed_for
from adadagrad.optimizers.extrapolated_adam import ExtrapolatedAdam
from adadagrad.optimizers.extrapolated_sgd import ExtrapolatedSGD

SHAPES = [(3, 4), (4,), (2, 2, 3), ()]
OPTIMIZERS = {"sgd": ExtrapolatedSGD, "adam": ExtrapolatedAdam}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES]


def data(step: int, worker: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + worker)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def loss_of(params: list[Any], noise: list[Tensor]) -> Tensor:
    """Not quadratic, and noisy."""
    return torch.stack([(p.sin() + (p * n) + p.square()).sum() for p, n in zip(params, noise, strict=True)]).sum()


def slope(points: list[Tensor], noise: list[Tensor]) -> list[Tensor]:
    return [p.cos() + n + 2 * p for p, n in zip(points, noise, strict=True)]


def train(optimizer: Any, params: list[nn.Parameter], steps: range, lrs: list[float] | None = None) -> None:
    for t in steps:
        for group in optimizer.param_groups:
            group["lr"] = lrs[t] if lrs else group["lr"]
        for k in range(optimizer.workers):
            with optimizer.extrapolated(worker=k):
                (loss_of(params, data(t, k)) / optimizer.workers).backward()
        optimizer.step()
        optimizer.zero_grad()


def sizes_of_filters(w: Tensor, xi: Tensor, norm: str) -> Tensor:
    """One filter after the other."""
    found = torch.ones_like(w)
    rows = [()] if w.ndim < 2 else [(i,) for i in range(w.shape[0])]
    for row in rows:
        f, x = w[row], xi[row]
        n = sum(float(e) ** 2 for e in f.flatten()) ** 0.5
        own = sum(float(e) ** 2 for e in x.flatten()) ** 0.5
        found[row] = {"rms": n / f.numel() ** 0.5, "norm": n, "match": n / own}[norm]
    return found


def reference_sgd(steps: int, lrs: list[float], **options: Any) -> list[Tensor]:
    """The equations, one tensor after the other."""
    o: dict[str, Any] = {
        "momentum": 0.9, "extrapolation": 1.0, "perturb": "past_local", "nesterov": True, "filter_norm": "rms",
        "weight_decay": 0.0, "workers": 1, "seed": 0, "maximize": False,
    } | options  # fmt: skip
    workers, u, sign = o["workers"], o["momentum"], 1 if o["maximize"] else -1
    w = [p.detach().clone() for p in parameters()]
    v = [torch.zeros_like(p) for p in w]
    past: list[list[Tensor]] = [[torch.zeros_like(p) for p in w] for _ in range(workers)]
    for t in range(steps):
        lr = lrs[t]
        length = o["extrapolation"] * lr
        ahead = [a + u * b if o["nesterov"] else a for a, b in zip(w, v, strict=True)]
        found = []
        for k in range(workers):
            if o["perturb"] == "past_local":
                zeta = [sign * length * g for g in past[k]]
            elif o["perturb"] == "past_global":
                zeta = [sign * length * sum(gs) / workers for gs in zip(*past, strict=True)]
            else:
                zeta = []
                for i, p in enumerate(w):
                    generator = torch.Generator().manual_seed(seed_for(o["seed"], t, 0, k, i))
                    xi = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    scale = sizes_of_filters(p, xi, o["filter_norm"]) if o["perturb"] == "filter" else 1.0
                    zeta.append(length * scale * xi)
            found.append(slope([a + z for a, z in zip(ahead, zeta, strict=True)], data(t, k)))
        past = found
        for i in range(len(w)):
            mean = sum(g[i] for g in found) / workers
            v[i] = u * v[i] + sign * lr * mean - lr * o["weight_decay"] * ahead[i]
            w[i] = w[i] + v[i]
    return w


SGD: list[dict[str, Any]] = [
    {},
    {"momentum": 0.0},
    {"momentum": 0.5},
    {"extrapolation": 0.0},
    {"extrapolation": 3.0},
    {"perturb": "past_global"},
    {"perturb": "isotropic"},
    {"perturb": "filter"},
    {"perturb": "filter", "filter_norm": "norm"},
    {"perturb": "filter", "filter_norm": "match"},
    {"perturb": "filter", "seed": 5},
    {"perturb": "isotropic", "seed": 5, "momentum": 0.0},
    {"nesterov": False},
    {"weight_decay": 0.2},
    {"weight_decay": 0.2, "nesterov": False},
    {"weight_decay": 0.2, "momentum": 0.0},
    {"workers": 3},
    {"workers": 3, "perturb": "past_global"},
    {"workers": 2, "perturb": "isotropic"},
    {"workers": 2, "perturb": "filter", "maximize": True},
    {"maximize": True},
    {"maximize": True, "weight_decay": 0.2},
]
LRS = [0.02, 0.02, 0.03, 0.01, 0.05, 0.05, 0.02]


@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_equals_the_equations(options: dict[str, Any]) -> None:
    params = parameters()
    train(ExtrapolatedSGD(params, **options), params, range(7), LRS)
    for param, expected in zip(params, reference_sgd(7, LRS, **options), strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-13)


def reference_adam(steps: int, lrs: list[float], **options: Any) -> list[Tensor]:
    o: dict[str, Any] = {
        "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "extrapolation": 1.0, "direction": "precond",
        "workers": 1, "maximize": False,
    } | options  # fmt: skip
    sign = 1 if o["maximize"] else -1
    (b1, b2), workers = o["betas"], o["workers"]
    w = [p.detach().clone() for p in parameters()]
    m, v = [torch.zeros_like(p) for p in w], [torch.zeros_like(p) for p in w]
    d = [[torch.zeros_like(p) for p in w] for _ in range(workers)]
    for t in range(steps):
        lr = lrs[t]
        found = []
        for k in range(workers):
            z = [p - o["extrapolation"] * lr * e for p, e in zip(w, d[k], strict=True)]
            found.append([-sign * g for g in slope(z, data(t, k))])
        for i in range(len(w)):
            g = sum(f[i] for f in found) / workers
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            step = m[i] / (1 - b1 ** (t + 1)) / ((v[i] / (1 - b2 ** (t + 1))).sqrt() + o["eps"])
            w[i] = w[i] * (1 - lr * o["weight_decay"]) - lr * step
            for k in range(workers):
                d[k][i] = step if o["direction"] == "precond" else found[k][i]
    return w


ADAM: list[dict[str, Any]] = [
    {},
    {"betas": (0.5, 0.9)},
    {"eps": 0.1},
    {"weight_decay": 0.2},
    {"extrapolation": 0.0},
    {"extrapolation": 4.0},
    {"direction": "grad"},
    {"direction": "grad", "workers": 3},
    {"direction": "grad", "maximize": True},
    {"maximize": True},
]


@pytest.mark.parametrize("options", ADAM, ids=str)
def test_adam_equals_the_equations(options: dict[str, Any]) -> None:
    params = parameters()
    train(ExtrapolatedAdam(params, **options), params, range(7), LRS)
    for param, expected in zip(params, reference_adam(7, LRS, **options), strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=1e-11, atol=1e-12)


CHANGES = [
    *(("sgd", {}, {"lr": 0.07}), ("sgd", {}, {"momentum": 0.5}), ("sgd", {}, {"extrapolation": 0.5})),
    *(("sgd", {}, {"nesterov": False}), ("sgd", {}, {"weight_decay": 0.1}), ("sgd", {}, {"maximize": True})),
    *(("sgd", {}, {"perturb": name}) for name in ("isotropic", "filter")),
    *(("sgd", {"perturb": "filter"}, {"perturb": "filter", "filter_norm": name}) for name in ("norm", "match")),
    *(("sgd", {"perturb": name}, {"perturb": name, "seed": 1}) for name in ("isotropic", "filter")),
    ("sgd", {"workers": 2}, {"workers": 3}),
    ("sgd", {"workers": 2}, {"workers": 2, "perturb": "past_global"}),
    *(("adam", {}, {"lr": 0.07}), ("adam", {}, {"betas": (0.8, 0.999)}), ("adam", {}, {"betas": (0.9, 0.9)})),
    *(("adam", {}, {"eps": 0.1}), ("adam", {}, {"weight_decay": 0.1}), ("adam", {}, {"extrapolation": 0.5})),
    *(("adam", {}, {"direction": "grad"}), ("adam", {}, {"maximize": True})),
    ("adam", {"direction": "grad", "workers": 2}, {"direction": "grad", "workers": 3}),
]


@pytest.mark.parametrize(("kind", "base", "options"), CHANGES, ids=str)
def test_every_argument_changes_something(kind: str, base: dict[str, Any], options: dict[str, Any]) -> None:
    plain, changed = parameters(), parameters()
    train(OPTIMIZERS[kind](plain, **{"lr": 0.05, **base}), plain, range(6))
    train(OPTIMIZERS[kind](changed, **{"lr": 0.05, **options}), changed, range(6))
    pairs = [(a, b) for a, b in zip(plain, changed, strict=True) if a.numel() > 1]  # one entry: norm is RMS
    assert all(not torch.allclose(a, b, rtol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_extrapolation_and_momentum_it_is_torch_sgd(decay: float, maximize: bool) -> None:
    params, others = parameters(), parameters()
    options = {"lr": 0.05, "weight_decay": decay, "maximize": maximize}
    train(ExtrapolatedSGD(params, momentum=0.0, extrapolation=0.0, **options), params, range(10))
    other = torch.optim.SGD(others, **options)
    for t in range(10):
        loss_of(others, data(t)).backward()
        other.step()
        other.zero_grad()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_extrapolation_the_look_ahead_is_what_torch_stores(decay: float, nesterov: bool) -> None:
    """w + u v for Nesterov's form, w itself for the heavy ball; with decay too, which is taken at that point."""
    params, others = parameters(), parameters()
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": decay, "nesterov": nesterov}
    optimizer, other = ExtrapolatedSGD(params, extrapolation=0.0, **options), torch.optim.SGD(others, **options)
    for t in range(10):
        train(optimizer, params, range(t, t + 1))
        loss_of(others, data(t)).backward()
        other.step()
        other.zero_grad()
        for a, b in zip(params, others, strict=True):
            ahead = a + 0.9 * optimizer.state[a]["velocity"] if nesterov else a
            torch.testing.assert_close(ahead, b, rtol=4e-15, atol=4e-16 if t < 3 else 4e-15)


def test_without_extrapolation_adam_is_torch_adamw() -> None:
    params, others = parameters(), parameters()
    train(ExtrapolatedAdam(params, lr=0.05, weight_decay=0.1, extrapolation=0.0), params, range(10))
    other = torch.optim.AdamW(others, lr=0.05, weight_decay=0.1)
    for t in range(10):
        loss_of(others, data(t)).backward()
        other.step()
        other.zero_grad()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def quadratic(curvature: float, lr: float, length: float, steps: int) -> float:
    x = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = ExtrapolatedSGD([x], lr=lr, momentum=0.0, extrapolation=length / lr)
    for _ in range(steps):
        with optimizer.extrapolated():
            (x.square() * curvature / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return x.item()


def test_on_a_quadratic_in_one_dimension() -> None:
    assert quadratic(2.0, 0.3, 0.2, 6) == pytest.approx(0.064, abs=1e-12)
    matrix = torch.tensor([[1 - 0.6, 0.12], [2.0, -0.4]], dtype=torch.float64)  # of (w, g)
    for steps in range(1, 10):
        power = torch.linalg.matrix_power(matrix, steps) @ torch.tensor([1.0, 0.0], dtype=torch.float64)
        assert quadratic(2.0, 0.3, 0.2, steps) == pytest.approx(float(power[0]), abs=1e-12)
    assert float(torch.linalg.eigvals(matrix).abs().max()) == pytest.approx(0.632456, abs=1e-6)


@pytest.mark.parametrize(("lr", "length"), [(0.3, 0.7), (0.6, 0.4), (0.1, 0.4), (0.2, 0.6)])
def test_diverges_beyond_the_boundary_and_not_before(lr: float, length: float) -> None:
    """gamma L + 2 gamma-hat L = 2 is the boundary: scale L to both sides of it."""
    at = 2 / (lr + 2 * length)
    assert abs(quadratic(0.98 * at, lr, length, 2000)) < 1e-6
    assert abs(quadratic(1.02 * at, lr, length, 2000)) > 1e3


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_identical_workers_are_one(kind: str) -> None:
    options: dict[str, Any] = {"direction": "grad"} if kind == "adam" else {}
    results = []
    for workers in (1, 4):
        params = parameters()
        optimizer = OPTIMIZERS[kind](params, lr=0.05, workers=workers, **options)
        for t in range(6):
            for k in range(workers):
                with optimizer.extrapolated(k):
                    (loss_of(params, data(t)) / workers).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_without_extrapolation_workers_are_one_of_a_larger_batch() -> None:
    params, others = parameters(), parameters()
    train(ExtrapolatedSGD(params, workers=4, extrapolation=0.0), params, range(6))
    optimizer = ExtrapolatedSGD(others, extrapolation=0.0)
    for t in range(6):
        with optimizer.extrapolated():
            torch.stack([loss_of(others, data(t, k)) for k in range(4)]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_batch_normalisation_sees_each_batch_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = ExtrapolatedSGD(model.parameters())
    for t in range(3):
        seen: list[Tensor] = []
        handle = model[0].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.detach()))
        before = copy.deepcopy(model[1].state_dict())
        with optimizer.extrapolated():
            model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.remove()
        assert int(model[1].num_batches_tracked) == t + 1  # type: ignore[arg-type]
        assert len(seen) == 1
        expected = 0.9 * before["running_mean"] + 0.1 * seen[0].mean(0)
        torch.testing.assert_close(model[1].running_mean, expected)
