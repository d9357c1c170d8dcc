"""MAdam and LaMAdam against the equations in plain float64, and against the fixed-decay optimizers they contain."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers.lamadam import LaMAdam
from adadagrad.optimizers.madam import MAdam
from adadagrad.optimizers.maxva import weights_of_new

SHAPES = [(3, 4), (4,), (2, 2, 3), ()]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES]


def gradients(step: int, params: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Of a noisy quadratic."""
    generator = torch.Generator().manual_seed(100 + step)
    noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    return [scale * (2 * p.detach() + n) for p, n in zip(params, noise, strict=True)]


def beta_of(u: float, v: float, w: float, g: float, low: float, high: float) -> float:
    """The closed form for one coordinate, with the running sums u, v and their weight w."""
    mean = u / w if w else 0.0
    s2 = max(v / w - mean**2, 0.0) if w else 0.0
    d = (g - mean) ** 2
    if d + s2 == 0:
        return low
    return min(max((d + s2) / (w * (d - s2) + d + s2), low), high)


def reference(kind: str, params: list[Tensor], steps: int, lrs: list[float], **options: Any) -> list[Tensor]:
    """The equations in plain numbers, one coordinate after the other."""
    o: dict[str, Any] = {
        "momentum": 0.9, "beta_range": (0.5, 0.999 if kind == "madam" else 0.98),
        "eps": 1e-8 if kind == "madam" else 1e-15, "weight_decay": 0.0, "decoupled": True, "amsgrad": False,
        "nesterov": False, "moment_warmup": 0, "trust_ratio": False,
    } | options  # fmt: skip
    a, decay = o["momentum"], o["weight_decay"]
    x = [p.detach().clone() for p in params]
    states = [[[0.0] * 5 for _ in range(p.numel())] for p in x]  # u, v, w, m or q, largest root
    average = 0.0
    for t in range(1, steps + 1):
        eta = lrs[t - 1]
        average = a * average + (1 - a) * eta
        for p, grad, state in zip(x, gradients(t, x), states, strict=True):
            flat, step = p.view(-1), []
            for j, g in enumerate(grad.flatten().tolist()):
                if not o["decoupled"]:
                    g += decay * float(flat[j])
                u, v, w, m, largest = state[j]
                beta = beta_of(u, v, w, g, *o["beta_range"])
                u, v, w = beta * u + (1 - beta) * g, beta * v + (1 - beta) * g * g, beta * w + 1 - beta
                root = math.sqrt(v / w)
                largest = max(largest, root)
                denominator = (largest if o["amsgrad"] else root) + o["eps"]
                if kind == "madam":
                    m = a * m + (1 - a) * g
                    top = a * m + (1 - a) * g if o["nesterov"] else m
                    step.append(top / (1 - a ** (t + o["nesterov"])) / denominator)
                else:
                    m = a * m + (1 - a) * eta * g / denominator
                    step.append(m / average if average else 0.0)
                state[j] = [u, v, w, m, largest]
            if t <= o["moment_warmup"]:
                continue
            direction = torch.tensor(step, dtype=torch.float64)
            shrink = decay if o["decoupled"] else 0.0
            if o["trust_ratio"] and decay:
                direction = direction + shrink * flat
                flat -= eta * float(flat.norm() / direction.norm()) * direction
            else:
                flat.mul_(1 - eta * shrink).sub_(eta * direction)
    return x


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, lrs: list[float]) -> None:
    for t in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lrs[t - 1]
        for p, grad in zip(params, gradients(t, list(params)), strict=True):
            p.grad = grad
        optimizer.step()


KINDS = {"madam": MAdam, "lamadam": LaMAdam}
COMMON: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5},
    {"beta_range": (0.7, 0.9)},
    {"eps": 0.3},
    {"weight_decay": 0.3},
    {"weight_decay": 0.3, "decoupled": False},
    {"amsgrad": True, "beta_range": (0.5, 0.6)},
]
MADAM: list[dict[str, Any]] = [
    {"nesterov": True},
    {"moment_warmup": 3},
    {"moment_warmup": 2, "weight_decay": 0.5},
    {"trust_ratio": True, "weight_decay": 0.1},
    {"trust_ratio": True, "weight_decay": 0.1, "decoupled": False},
]
ROWS = [(kind, options) for kind in KINDS for options in COMMON] + [("madam", options) for options in MADAM]


@pytest.mark.parametrize(("kind", "options"), ROWS, ids=str)
def test_equals_the_equations(kind: str, options: dict[str, Any]) -> None:
    lrs = [0.05, 0.05, 0.1, 0.1, 0.02, 0.02, 0.05]
    params = parameters()
    expected = reference(kind, list(params), 7, lrs, **options)
    train(KINDS[kind](params, lr=0.05, **options), params, 7, lrs)
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), [row for row in ROWS if row[1]], ids=str)
def test_every_option_changes_something(kind: str, options: dict[str, Any]) -> None:
    plain, changed, lrs = parameters(), parameters(), [0.05] * 8
    base = {} if "weight_decay" not in options or len(options) == 1 else {"weight_decay": options["weight_decay"]}
    train(KINDS[kind](plain, lr=0.05, **base), plain, 8, lrs)
    train(KINDS[kind](changed, lr=0.05, **options), changed, 8, lrs)
    assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


def test_madam_with_one_beta_is_adam() -> None:
    params, others = parameters(), parameters()
    train(MAdam(params, beta_range=(0.97, 0.97), weight_decay=0.1), params, 30, [0.01] * 30)
    train(torch.optim.AdamW(others, betas=(0.9, 0.97), weight_decay=0.1), others, 30, [0.01] * 30)
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def laprop(params: list[nn.Parameter], steps: int, lr: float, betas: tuple[float, float], eps: float) -> list[Tensor]:
    """LaProp as published: normalise by the bias-corrected root, then average, then correct that average."""
    x = [p.detach().clone() for p in params]
    v, q = [torch.zeros_like(p) for p in x], [torch.zeros_like(p) for p in x]
    for t in range(1, steps + 1):
        for i, g in enumerate(gradients(t, x)):
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            q[i] = betas[0] * q[i] + (1 - betas[0]) * g / ((v[i] / (1 - betas[1] ** t)).sqrt() + eps)
            x[i] = x[i] - lr * q[i] / (1 - betas[0] ** t)
    return x


def test_lamadam_with_one_beta_is_laprop() -> None:
    params = parameters()
    expected = laprop(params, 30, 0.01, (0.8, 0.97), 1e-9)
    train(LaMAdam(params, lr=0.01, momentum=0.8, beta_range=(0.97, 0.97), eps=1e-9), params, 30, [0.01] * 30)
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-10, atol=1e-12)


def observed_variance(beta: Tensor, u: Tensor, v: Tensor, w: Tensor, g: Tensor) -> Tensor:
    """s^2_t under each beta."""
    weight = beta * w + 1 - beta
    mean = (beta * u + (1 - beta) * g) / weight
    return (beta * v + (1 - beta) * g * g) / weight - mean * mean


def test_beta_is_where_the_observed_variance_is_largest() -> None:
    generator = torch.Generator().manual_seed(3)
    grid = torch.linspace(0.3, 0.999, 20_001, dtype=torch.float64)
    for _ in range(200):
        mean, spread, w, g = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        g = 4 * g - 2
        u, v = mean * w, (mean**2 + spread) * w
        values = observed_variance(grid, *(torch.tensor(n, dtype=torch.float64) for n in (u, v, w, g)))
        ours = beta_of(u, v, w, g, 0.3, 0.999)
        lists = [[torch.tensor([n], dtype=torch.float64)] for n in (u, v, w, g)]
        assert 1 - float(weights_of_new(*lists, (0.3, 0.999), first=False)[0]) == pytest.approx(ours, rel=1e-12)  # type: ignore[arg-type]
        at = observed_variance(
            torch.full((), ours, dtype=torch.float64), *(torch.tensor(n, dtype=torch.float64) for n in (u, v, w, g))
        )
        assert float(at) >= float(values.max()) * (1 - 1e-12)
        assert float(grid[values.argmax()]) == pytest.approx(ours, abs=1.2e-4)
        assert ours >= min(1 / (1 + w), 0.999) - 1e-12


def test_observed_variance_is_never_below_that_of_the_longest_memory() -> None:
    params = parameters()
    optimizer = MAdam(params, lr=0.05)
    for t in range(1, 12):
        for p, grad in zip(params, gradients(t, list(params)), strict=True):
            p.grad = grad
        before = [
            tuple(optimizer.state[p][n].clone() for n in ("grad_avg", "grad_avg_sq", "weight")) for p in params if t > 1
        ]
        optimizer.step()
        for p, (u, v, w) in zip(params, before, strict=False):
            assert p.grad is not None
            held = observed_variance(torch.full((), 0.999, dtype=torch.float64), u, v, w, p.grad)
            assert bool((optimizer.variance(p) >= held - 1e-12).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_gradient_has_no_variance_and_steps_of_lr(kind: str) -> None:
    param = nn.Parameter(torch.zeros(3).double())
    optimizer = KINDS[kind]([param], lr=0.1, eps=1e-300)
    slope, last = torch.tensor([2.0, -0.3, 7.0]).double(), torch.zeros(3).double()
    for t in range(1, 30):
        param.grad = slope.clone()
        optimizer.step()
        weight = optimizer.state[param]["weight"]
        assert float(optimizer.variance(param).abs().max()) <= 1e-14 * 49
        torch.testing.assert_close(param.detach(), -0.1 * t * slope.sign(), rtol=1e-12, atol=1e-12)
        assert bool(((weight > last) | (weight == 1)).all())
        assert bool((weight <= 1).all())
        last = weight.clone()
    # D and s^2 are 0, or rounding: the betas are B_lo, or any
    assert float(last.min()) >= 1 - optimizer.param_groups[0]["beta_range"][1] ** 29 - 1e-12


def test_lamadam_weighs_gradients_by_their_learning_rates() -> None:
    param = nn.Parameter(torch.zeros(1).double())
    optimizer = LaMAdam([param], lr=0.1, beta_range=(0.98, 0.98))
    lrs, normalised, v, position = [0.0, 0.1, 0.3, 0.05], [], 0.0, 0.0
    for t, lr in enumerate(lrs, 1):
        g = float(t * (-1) ** t)
        v = 0.98 * v + 0.02 * g * g
        normalised.append(g / math.sqrt(v / (1 - 0.98**t)))
        weights = [eta * 0.9 ** (t - i) for i, eta in enumerate(lrs[:t], 1)]
        mean = sum(w * n for w, n in zip(weights, normalised, strict=True)) / sum(weights) if sum(weights) else 0.0
        position -= lr * mean
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.tensor([g]).double()
        optimizer.step()
        assert float(param.detach()) == pytest.approx(position, rel=1e-12, abs=1e-15)  # 0 at the first, whose lr is 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_smallest_beta_of_one_half_or_less_changes_nothing(kind: str) -> None:
    one, two = parameters(), parameters()
    for params, low in ((one, 0.5), (two, 0.01)):
        train(KINDS[kind](params, lr=0.05, beta_range=(low, 0.98)), params, 12, [0.05] * 12)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_scale_of_the_gradient_drops_out(kind: str) -> None:
    """Down to gradients of 1e-12 in float32, where an epsilon in the closed form would take over."""
    found = []
    for scale in (1.0, 2.0**-40):
        params = [nn.Parameter(p.detach().float()) for p in parameters()]
        optimizer = KINDS[kind](params, lr=0.05, eps=1e-30)
        for t in range(1, 10):
            for p, grad in zip(params, gradients(t, list(params)), strict=True):
                p.grad = grad * scale
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_what_it_says_of_its_betas_and_of_the_noise() -> None:
    params = parameters()
    optimizer = MAdam([("weight", params[0]), ("bias", params[1])], lr=0.05, beta_range=(0.9, 0.99))
    assert optimizer.noise_proxy() == {"all": math.inf}
    assert torch.equal(optimizer.variance(params[0]), torch.zeros(3, 4).double())
    for t in range(1, 6):
        for p, grad in zip(params[:2], gradients(t, list(params[:2])), strict=True):
            p.grad = grad
        betas = optimizer.betas_of(params[0])
        assert params[0].grad is not None
        old = {n: optimizer.state[params[0]].get(n, torch.zeros(3, 4).double()).clone() for n in ("grad_avg", "weight")}
        stats = optimizer.beta_stats()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[params[0]]["weight"], betas * old["weight"] + 1 - betas)
        torch.testing.assert_close(
            optimizer.state[params[0]]["grad_avg"], betas * old["grad_avg"] + (1 - betas) * params[0].grad
        )
        assert set(stats) == {"weight", "bias"}
        low, high, between = stats["weight"]
        assert low == pytest.approx(float((betas <= 0.9 + 1e-9).double().mean()))
        assert high == pytest.approx(float((betas >= 0.99 - 1e-9).double().mean()))
        assert between == pytest.approx(1 - low - high)
    proxy = optimizer.noise_proxy()
    state = optimizer.state[params[0]]
    mean = state["grad_avg"] / state["weight"]
    expected = float(optimizer.variance(params[0]).sum() / mean.square().sum())
    assert proxy["weight"] == pytest.approx(expected)
    assert min(proxy["weight"], proxy["bias"]) <= proxy["all"] <= max(proxy["weight"], proxy["bias"])


def test_betas_of_needs_a_gradient() -> None:
    params = parameters()
    with pytest.raises(InvalidArgument, match="betas_of needs a parameter with a gradient"):
        MAdam(params).betas_of(params[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"momentum": 1.0}, "momentum must be >= 0 and below 1"),
        ({"beta_range": (0.5, 1.0)}, r"beta_range\[1\] must be >= 0 and below 1"),
        ({"beta_range": (0.9, 0.5)}, "beta_range must be \\(smallest, largest\\)"),
        ({"beta_range": 0.9}, "beta_range must be two numbers"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_options(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        KINDS[kind](parameters(), **({"lr": 0.1} | options))


def test_bad_options_of_madam() -> None:
    with pytest.raises(InvalidArgument, match="moment_warmup must be >= 0"):
        MAdam(parameters(), moment_warmup=-1)
    with pytest.raises(InvalidArgument, match="moment_warmup reads the count of steps"):
        MAdam(parameters(), moment_warmup=1, capturable=True)
