"""MARS and MARS-M against the equations in plain float64, one tensor at a time, and against optimizers they contain."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers.mars import MARS
from adadagrad.optimizers.mars_m import MARSM
from adadagrad.optimizers.orthogonal import COEFFICIENTS, orthogonalised

SHAPES = [(3, 4), (5, 2), (4,), (2, 2, 3), ()]
Grad = Callable[[int, list[Tensor]], list[Tensor]]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES]


def noisy_quadratic(scale: float = 1.0) -> Grad:
    """Gradients of a random quadratic, whose noise is that of the step's number: the same batch at any parameters."""

    def gradients(step: int, params: list[Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
        return [scale * (2 * p.detach() + n) for p, n in zip(params, noise, strict=True)]

    return gradients


def orthogonal_reference(m: Tensor, eps: float) -> Tensor:
    """Newton-Schulz in bfloat16, as written in the equations."""
    a, b, c = COEFFICIENTS
    x = m.bfloat16() / (m.bfloat16().norm() + eps)
    x = x.T if m.shape[0] > m.shape[1] else x
    for _ in range(5):
        g = x @ x.T
        x = a * x + (b * g + c * g @ g) @ x
    return (x.T if m.shape[0] > m.shape[1] else x).to(m.dtype)


def reference(kind: str, params: list[Tensor], gradients: Grad, steps: int, **options: Any) -> list[Tensor]:
    """The equations, one tensor after the other; `kind` is a variant of MARS, or "m" for MARS-M."""
    o: dict[str, Any] = {
        "lr": 3e-3, "betas": (0.95, 0.99), "eps": 1e-8, "weight_decay": 0.0, "gamma": 0.025, "mode": "approximate",
        "clip": True, "first_step": "code", "which": "2d" if kind == "m" else "ndim>=2", "lr_1d": None,
        "betas_1d": (0.9, 0.95), "weight_decay_1d": None, "cautious": False,
    } | options  # fmt: skip
    b1, b2 = o["betas"]
    k = o["gamma"] * b1 / (1 - b1)
    x = [p.detach().clone() for p in params]
    before: list[Tensor] | None = None
    last: list[Tensor] | None = None
    m = [torch.zeros_like(p) for p in x]
    v = [torch.zeros_like(p) for p in x]
    for t in range(1, steps + 1):
        g = gradients(t, x)
        h = last if o["mode"] == "approximate" else None if before is None else gradients(t, before)
        before, last = [p.clone() for p in x], [grad.clone() for grad in g]
        for i, p in enumerate(x):
            plain = {"none": True, "all": False, "2d": p.ndim != 2, "ndim>=2": p.ndim < 2}[o["which"]]
            if plain:
                a1, a2 = o["betas_1d"]
                m[i] = a1 * m[i] + (1 - a1) * g[i]
                v[i] = a2 * v[i] + (1 - a2) * g[i] ** 2
                u = m[i] / (1 - a1**t) / (torch.sqrt(v[i] / (1 - a2**t)) + o["eps"])
                lr = o["lr"] if o["lr_1d"] is None else o["lr_1d"]
                decay = o["weight_decay"] if o["weight_decay_1d"] is None else o["weight_decay_1d"]
                x[i] = p - lr * (u + decay * p)
                continue
            other = h[i] if h is not None else g[i] if o["first_step"] == "paper" else torch.zeros_like(p)
            c = g[i] + k * (g[i] - other)
            if o["clip"]:
                c = c / max(1.0, float(c.norm()))
            m[i] = b1 * m[i] + (1 - b1) * c
            v[i] = b2 * v[i] + (1 - b2) * c**2
            if kind == "lion":
                u = torch.sign(m[i])
            elif kind == "m":
                u = 0.2 * math.sqrt(max(p.shape)) * orthogonal_reference(m[i], o["eps"])
            elif kind == "shampoo" and p.ndim == 2:
                u = math.sqrt(max(1, p.shape[0] / p.shape[1])) * orthogonal_reference(m[i] / (1 - b1), o["eps"])
            else:
                u = m[i] / (1 - b1**t) / (torch.sqrt(v[i] / (1 - b2**t)) + o["eps"])
            if o["cautious"]:
                mask = (u * g[i] > 0).to(u.dtype)
                u = u * mask / max(float(mask.mean()), 1e-3)
            x[i] = p - o["lr"] * (u + o["weight_decay"] * p)
    return x


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], gradients: Grad, steps: range) -> None:
    for t in steps:

        def closure(t: int = t) -> float:
            for p, grad in zip(params, gradients(t, list(params)), strict=True):
                p.grad = grad
            return 0.0

        optimizer.step(closure)


def make(kind: str, params: Any, **options: Any) -> MARS | MARSM:
    if kind != "m":
        return MARS(params, variant=kind, **options)  # type: ignore[arg-type]
    betas = options.pop("betas", None)
    return MARSM(params, **options, **({} if betas is None else {"beta": betas[0]}))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "weight_decay": 0.3},
    {"betas": (0.8, 0.9), "gamma": 0.08},
    {"clip": False},
    {"clip": False, "first_step": "paper"},
    {"first_step": "paper"},
    {"which": "2d"},
    {"which": "none", "betas_1d": (0.7, 0.8), "lr_1d": 0.02, "weight_decay_1d": 0.2},
    {"lr_1d": 0.05, "weight_decay_1d": 0.5, "weight_decay": 0.1},
    {"cautious": True},
    {"eps": 0.1},
    {"mode": "exact"},
    {"mode": "exact", "gamma": 1.0, "clip": False},
    {"mode": "exact", "first_step": "paper", "cautious": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["adamw", "lion", "shampoo", "m"])
def test_equals_the_equations(kind: str, options: dict[str, Any]) -> None:
    """Also where nothing is clipped, where Lion and the orthogonalised updates keep no last gradient."""
    params, gradients = parameters(), noisy_quadratic()
    expected = reference(kind, list(params), gradients, 7, **options)
    optimizer = make(kind, params, **options)
    train(optimizer, params, gradients, range(1, 8))
    # Newton-Schulz runs in bfloat16, so that rounding of the last bit before it may show
    close = {"rtol": 1e-2, "atol": 1e-3} if kind in ("shampoo", "m") else {"rtol": 1e-10, "atol": 1e-12}
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value, **close)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_every_option_changes_something(options: dict[str, Any]) -> None:
    plain, changed = parameters(), parameters()
    gradients = noisy_quadratic(0.1)  # some are clipped, some not
    train(make("adamw", plain), plain, gradients, range(1, 4))
    train(make("adamw", changed, **options), changed, gradients, range(1, 4))
    assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


def test_variants_differ_and_all_trains_vectors_too() -> None:
    found = {}
    for kind in ("adamw", "lion", "shampoo", "m"):
        for which in ("2d",) if kind == "m" else ("ndim>=2", "all"):
            params = parameters()
            train(make(kind, params, which=which), params, noisy_quadratic(), range(1, 4))
            found[kind, which] = torch.cat([p.detach().flatten() for p in params])
    values = list(found.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[i + 1 :])


@pytest.mark.parametrize("which", ["all", "none", "ndim>=2"])
def test_without_correction_it_is_adamw(which: str) -> None:
    params, others = parameters(), parameters()
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
    ours = MARS(params, gamma=0.0, which=which, betas_1d=options["betas"], **options)  # type: ignore[arg-type]
    theirs = torch.optim.AdamW(others, **options)
    small = noisy_quadratic(scale=1e-3)  # no tensor's gradient is longer than 1
    train(ours, params, small, range(1, 21))
    train(theirs, others, small, range(1, 21))
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_long_gradient_is_clipped() -> None:
    p, q = nn.Parameter(torch.ones(4, 4).double()), nn.Parameter(torch.ones(4, 4).double())
    gradients = [torch.full((4, 4), 0.1), torch.full((4, 4), 5.0)]
    for param, clip in ((p, True), (q, False)):
        optimizer = MARS([param], gamma=0.0, clip=clip)
        for grad in gradients:
            param.grad = grad.double()
            optimizer.step()
    assert not torch.allclose(p, q)


def lion(params: list[Tensor], gradients: Grad, steps: int, lr: float, betas: tuple[float, float], decay: float) -> Any:
    """Lion as published: the sign of an average that is fresher than the one kept."""
    x, m = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    for t in range(1, steps + 1):
        for i, g in enumerate(gradients(t, x)):
            u = torch.sign(betas[0] * m[i] + (1 - betas[0]) * g)
            x[i] = x[i] - lr * (u + decay * x[i])
            m[i] = betas[1] * m[i] + (1 - betas[1]) * g
    return x, m


def test_approximate_lion_is_lion_with_a_fresher_average() -> None:
    params = parameters()
    expected, averages = lion(list(params), noisy_quadratic(), 9, 0.01, (0.95 * 0.975, 0.95), 0.1)
    optimizer = MARS(params, lr=0.01, variant="lion", clip=False, weight_decay=0.1, which="all")
    train(optimizer, params, noisy_quadratic(), range(1, 10))
    for param, value, average in zip(params, expected, averages, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(optimizer.state[param]["exp_avg"], average, rtol=1e-12, atol=1e-14)
        assert "previous_grad" not in optimizer.state[param]
        assert "exp_avg_sq" not in optimizer.state[param]


def test_a_scheduled_gamma() -> None:
    """The recursion takes each step's own; the closed form, where nothing is clipped, the present one for all."""
    gammas, different = [0.02, 0.1, 0.0, 0.1, 0.0, 0.1], 0
    for clip in (True, False):
        (param, *_), small = parameters(), noisy_quadratic(0.01)
        optimizer = MARS([param], lr=0.01, variant="lion", clip=clip)
        m, average, last = (torch.zeros_like(param) for _ in range(3))
        for t, gamma in enumerate(gammas, 1):
            optimizer.param_groups[0]["gamma"] = gamma
            (g,) = small(t, [param])
            before = param.detach().clone()
            param.grad = g.clone()
            optimizer.step()
            m = 0.95 * m + 0.05 * (g + gamma * 0.95 / 0.05 * (g - last))
            short = torch.lerp(average, g, 1 - 0.95 * (1 - gamma))
            average, last = torch.lerp(average, g, 0.05), g
            different += int((m.sign() != short.sign()).sum())
            torch.testing.assert_close(param.detach(), before - 0.01 * torch.sign(m if clip else short))
    assert different


def test_exact_correction_is_free_of_noise() -> None:
    """On x H x / 2 + xi x, c - g is k H (x_t - x_{t-1}), whatever the noise xi."""
    params, gradients = parameters(), noisy_quadratic()
    optimizer = MARS(params, lr=0.05, gamma=0.5, mode="exact", clip=False, which="all")
    b1, k = 0.95, 0.5 * 0.95 / 0.05
    train(optimizer, params, gradients, range(1, 4))
    before = [optimizer.state[p]["previous_param"].clone() for p in params]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in params]
    now = [p.detach().clone() for p in params]
    train(optimizer, params, gradients, range(4, 5))
    for p, old, m, x, g in zip(params, before, moments, now, gradients(4, now), strict=True):
        c = (optimizer.state[p]["exp_avg"] - b1 * m) / (1 - b1)
        torch.testing.assert_close(c - g, k * 2 * (x - old), rtol=1e-9, atol=1e-10)


def test_full_correction_is_storm() -> None:
    """gamma = 1, nothing clipped: m_t = g_t + b1 (m_{t-1} - h_t) from the second step on."""
    params, gradients = parameters(), noisy_quadratic()
    optimizer = MARS(params, lr=0.05, gamma=1.0, mode="exact", clip=False, which="all", variant="lion")
    train(optimizer, params, gradients, range(1, 3))
    for t in range(3, 7):
        before = [optimizer.state[p]["previous_param"].clone() for p in params]
        moments = [optimizer.state[p]["exp_avg"].clone() for p in params]
        now = [p.detach().clone() for p in params]
        train(optimizer, params, gradients, range(t, t + 1))
        for p, m, g, h in zip(params, moments, gradients(t, now), gradients(t, before), strict=True):
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], g + 0.95 * (m - h), rtol=1e-10, atol=1e-12)


def test_scale_of_the_gradient_drops_out_where_all_is_clipped() -> None:
    params, others = parameters(), parameters()
    for some, scale in ((params, 1e3), (others, 1e4)):
        train(MARS(some, eps=1e-300, which="all", lr=0.1), some, noisy_quadratic(scale), range(1, 6))
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_dropout_is_the_same_at_both_places() -> None:
    """With the same masks the two gradients of a linear loss are equal, and the correction is 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Dropout(0.5)).double()
    (w,) = model.parameters()
    optimizer = MARS(model.parameters(), lr=0.1, gamma=1.0, mode="exact", clip=False, first_step="paper")
    x, seen = torch.randn(4, 6).double(), []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        assert w.grad is not None
        seen.append(w.grad.clone())
        return float(loss.detach())

    moment = torch.zeros_like(w)
    for _ in range(4):
        seen.clear()
        optimizer.step(closure)
        moment = 0.95 * moment + 0.05 * seen[0]
        torch.testing.assert_close(optimizer.state[w]["exp_avg"], moment.detach())
        assert w.grad is not None
        assert torch.equal(w.grad, seen[0])
    after = torch.rand(1)  # the second evaluation draws nothing from the generator
    torch.manual_seed(0)
    nn.Linear(6, 6, bias=False)
    torch.randn(4, 6)
    for _ in range(4):
        nn.Dropout(0.5)(torch.ones(4, 6).double())
    assert torch.equal(after, torch.rand(1))


def test_an_error_in_the_second_evaluation_leaves_everything_as_it_was() -> None:
    params, calls = parameters(), []
    optimizer = MARS(params, mode="exact")
    train(optimizer, params, noisy_quadratic(), range(1, 3))
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())

    def closure() -> float:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no more")
        for p in params:
            p.grad = torch.ones_like(p)
        return 0.0

    with pytest.raises(RuntimeError, match="no more"):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for number, saved in state["state"].items():
        assert all(torch.equal(optimizer.state[params[number]][name], value) for name, value in saved.items())


def test_learning_rate_of_the_others_follows_the_schedule() -> None:
    param = nn.Parameter(torch.zeros(3).double())
    optimizer = MARS([param], lr=0.1, lr_1d=0.02, eps=1e-300)
    optimizer.param_groups[0]["lr"] = 0.05
    param.grad = torch.tensor([1.0, -3.0, 0.1]).double()
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-0.01, 0.01, -0.01]).double())


def test_summary_says_what_trains_how() -> None:
    params = parameters()
    groups = [
        {"params": [("weight", params[0]), ("bias", params[2])], "lr": 0.2, "lr_1d": 0.1, "weight_decay_1d": 0.5},
        {"params": [("kernel", params[3])], "variant": "shampoo", "weight_decay": 0.3},
    ]
    optimizer = MARS(groups, lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.02
    found = [tuple(row.values()) for row in optimizer.summary()]
    assert found == [
        ("weight", (3, 4), "adamw", 0.02, 0.0),
        ("bias", (4,), "plain", 0.01, 0.5),
        ("kernel", (2, 2, 3), "adamw", 0.1, 0.3),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be >= 0 and below 1, got 1.0"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"betas_1d": (0.9, -0.1)}, r"betas_1d\[1\]"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"gamma": -0.1}, "gamma must be >= 0"),
        ({"lr_1d": 0.0}, "lr_1d must be > 0"),
        ({"weight_decay_1d": -1.0}, "weight_decay_1d must be >= 0"),
        ({"variant": "adam"}, "unknown variant 'adam': did you mean adamw"),
        ({"mode": "approx"}, "unknown mode 'approx': did you mean approximate"),
        ({"first_step": "zero"}, "unknown first_step"),
        ({"which": "matrices"}, "unknown which"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        MARS(parameters(), **options)


def test_exact_mode_needs_a_closure_and_all_groups() -> None:
    params = parameters()
    optimizer = MARS(params, mode="exact")
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(InvalidArgument, match=r"call step\(closure\), use AdaptiveBatch\(replay=True\)"):
        optimizer.step()
    with pytest.raises(InvalidArgument, match="mode must be the same for all groups"):
        MARS([{"params": params[:1], "mode": "exact"}, {"params": params[1:]}])


def test_a_large_gamma_in_approximate_mode_warns() -> None:
    with pytest.warns(UserWarning, match='adds more noise than it takes away: use at most 0.1, or mode="exact"'):
        MARS(parameters(), gamma=0.2)


def test_marsm_refuses_bad_options() -> None:
    with pytest.raises(InvalidArgument, match="beta must be >= 0 and below 1"):
        MARSM(parameters(), beta=1.0)
    with pytest.raises(InvalidArgument, match="unknown which"):
        MARSM(parameters(), which="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(6, 6), (3, 8), (8, 3)])
def test_orthogonalised_has_the_singular_vectors_and_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalised(matrix, dtype=None) @ v.T
    values = inner.diagonal()
    torch.testing.assert_close(inner, torch.diag(values), rtol=0, atol=1e-8)
    assert bool(((values > 0.6) & (values < 1.3)).all()), s
