"""What the context of the extrapolating optimizers promises: exact parameters outside, whatever happens inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adadagrad.core.errors import StepError
from adadagrad.optimizers.extrapolated_sgd import ExtrapolatedSGD
from tests.optimizers.test_extrapolation import OPTIMIZERS, data, loss_of, parameters, train

KINDS: list[tuple[str, dict[str, Any]]] = [
    *(("sgd", {"perturb": name}) for name in ("past_local", "past_global", "isotropic", "filter")),
    *(("adam", {"direction": name}) for name in ("precond", "grad")),
]


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def started(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    optimizer = OPTIMIZERS[kind](params, lr=0.1, **options)
    train(optimizer, params, range(3))
    return params, optimizer


def failing_window(params: list[nn.Parameter], optimizer: Any, error: BaseException) -> None:
    with optimizer.extrapolated():
        loss_of(params, data(9)).backward()
        raise error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_displaced_inside_and_exact_outside(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params, optimizer = started(kind, options, dtype)
    before, places = values(params), [p.data_ptr() for p in params]
    with optimizer.extrapolated():
        assert all(not torch.equal(a, b) for a, b in zip(params, before, strict=True))
        assert [p.data_ptr() for p in params] == places
    assert same(params, before)
    assert [p.data_ptr() for p in params] == places


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_after_an_error_parameters_and_state_are_as_before(
    kind: str, options: dict[str, Any], error: type[BaseException]
) -> None:
    params, optimizer = started(kind, options)
    other_params, other = started(kind, options)
    before, state = values(params), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error):
        failing_window(params, optimizer, error())
    assert same(params, before)
    for number, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][number][name]) for name, value in entries.items())
    optimizer.zero_grad()
    train(optimizer, params, range(3, 6))
    train(other, other_params, range(3, 6))
    assert same(params, other_params)


def test_an_error_while_displacing_undoes_the_part_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    params, optimizer = started("sgd", {"perturb": "filter"})
    before = values(params)
    import adadagrad.optimizers.extrapolated_sgd as module

    calls, draw = [], module.gaussian

    def failing(like: Tensor, seed: int) -> Tensor:
        calls.append(seed)
        if len(calls) == 3:
            assert not torch.equal(params[0], before[0])
            raise MemoryError
        return draw(like, seed)

    monkeypatch.setattr(module, "gaussian", failing)
    with pytest.raises(MemoryError), optimizer.extrapolated():
        raise AssertionError
    assert same(params, before)
    optimizer.step()  # no longer inside


@pytest.mark.parametrize("recorded", [True, False])
def test_gradients_after_an_error(recorded: bool) -> None:
    """Where the context keeps local gradients it puts those of the window back; else they are as any loop has them."""
    params, optimizer = started("sgd", {"perturb": "past_local" if recorded else "filter"})
    with optimizer.extrapolated():
        loss_of(params, data(7)).backward()
    grads = [p.grad.clone() for p in params if p.grad is not None]
    with pytest.raises(RuntimeError, match="half way"):
        failing_window(params, optimizer, RuntimeError("half way"))
    assert same([p.grad for p in params], grads) == recorded
    if recorded:  # tried again, it is as if nothing had happened
        other_params, other = started("sgd", {})
        for some, one in ((params, optimizer), (other_params, other)):
            for number in (8,) if one is optimizer else (7, 8):
                with one.extrapolated():
                    loss_of(some, data(number)).backward()
            one.step()
        assert same(params, other_params)
        name = "local_gradient"
        assert same([optimizer.state[p][name] for p in params], [other.state[p][name] for p in other_params])


def test_views_and_overlapping_parameters() -> None:
    """A view sees the displacement, and parameters that share memory come back exactly."""
    flat = torch.randn(10)
    whole, part = nn.Parameter(flat), nn.Parameter(flat[2:6])
    optimizer = ExtrapolatedSGD([whole, part], perturb="isotropic")
    before = flat.clone()
    with optimizer.extrapolated():
        assert not torch.equal(flat, before)
    assert torch.equal(flat, before)


def test_entering_twice_and_stepping_inside_are_refused() -> None:
    params, optimizer = started("sgd", {})
    before = values(params)
    for call, name in [
        (optimizer.extrapolated().__enter__, r"extrapolated\(\) was entered"),
        (optimizer.step, "step was called"),
        (lambda: optimizer.load_state_dict(optimizer.state_dict()), "load_state_dict was called"),
        (lambda: optimizer.add_param_group({"params": parameters()}), "add_param_group was called"),
    ]:
        with pytest.raises(StepError, match=rf"{name} inside .with optimizer.extrapolated\(\):., .* leave it first"):  # noqa: SIM117
            with optimizer.extrapolated():
                call()
        assert same(params, before)
    with optimizer.extrapolated():
        loss_of(params, data(1)).backward()
        with pytest.raises(StepError):
            optimizer.step()
        assert not same(params, before)  # still inside
    optimizer.step()
    assert not same(params, before)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=str)
def test_gradients_at_the_wrong_point_are_refused(kind: str, options: dict[str, Any]) -> None:
    params, optimizer = started(kind, options)
    optimizer.step()  # without gradients there is nothing to refuse
    before = values(params)
    loss_of(params, data(1)).backward()
    with pytest.raises(StepError, match=r"forward and backward into .with optimizer.extrapolated\(\):"):
        optimizer.step()
    assert same(params, before)
    optimizer.zero_grad()
    with optimizer.extrapolated():
        loss_of(params, data(1)).backward()
    optimizer.zero_grad()  # ends the window
    loss_of(params, data(1)).backward()
    with pytest.raises(StepError):
        optimizer.step()
    assert same(params, before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("sgd", {"momentum": 0.0}), ("sgd", {"nesterov": False}), ("adam", {}), ("adam", {"direction": "grad"})],
)
def test_where_nothing_is_displaced_the_context_is_not_needed(kind: str, options: dict[str, Any]) -> None:
    params, optimizer = started(kind, {**options, "extrapolation": 0.0})
    others, other = started(kind, {**options, "extrapolation": 0.0})
    loss_of(params, data(1)).backward()
    optimizer.step()
    train(other, others, range(1, 2))
    assert same(params, others)


def test_contexts_of_one_window_add_up_beside_what_was_there() -> None:
    params, optimizer = started("sgd", {}, torch.float64)
    outside = data(50)
    for p, g in zip(params, outside, strict=True):
        p.grad = g.clone()
    there = [p.grad for p in params]
    local = [torch.zeros_like(p) for p in params]
    for number in (1, 2, 3):
        with optimizer.extrapolated():
            assert all(p.grad is None for p in params)
            points = [p.detach().clone().requires_grad_() for p in params]
            loss_of(params, data(number)).backward()
        for total, g in zip(local, torch.autograd.grad(loss_of(points, data(number)), points), strict=True):
            total += g
    assert all(p.grad is g for p, g in zip(params, there, strict=True))  # the very same tensors
    for p, g, extra in zip(params, local, outside, strict=True):
        torch.testing.assert_close(p.grad, g + extra, rtol=1e-13, atol=1e-13)
    optimizer.step()
    for p, g in zip(params, local, strict=True):
        torch.testing.assert_close(optimizer.state[p]["local_gradient"], g, rtol=1e-13, atol=1e-13)


def test_the_local_gradient_is_that_of_the_context_whatever_happens_to_it_later() -> None:
    params, optimizer = started("sgd", {}, torch.float64)
    with optimizer.extrapolated():
        loss_of(params, data(1)).backward()
    raw = [p.grad.clone() for p in params if p.grad is not None]
    nn.utils.clip_grad_norm_(params, 1e-3)
    optimizer.scale_local_(0.5)
    optimizer.step()
    for p, g in zip(params, raw, strict=True):
        assert torch.equal(optimizer.state[p]["local_gradient"], 0.5 * g)
        assert p.grad is not None
        p.grad.zero_()
        assert torch.equal(optimizer.state[p]["local_gradient"], 0.5 * g)


def test_zero_grad_inside_drops_what_was_set_aside() -> None:
    for to_none in (True, False):
        params, optimizer = started("sgd", {}, torch.float64)
        others, other = started("sgd", {}, torch.float64)
        with optimizer.extrapolated():
            loss_of(params, data(1)).backward()
        with optimizer.extrapolated():
            optimizer.zero_grad(set_to_none=to_none)
            loss_of(params, data(2)).backward()
        optimizer.step()
        train(other, others, range(2, 3))
        assert same(params, others)
        name = "local_gradient"
        assert same([optimizer.state[p][name] for p in params], [other.state[p][name] for p in others])


def test_a_skipped_step_leaves_nothing_behind() -> None:
    """A window of NaN that the loop drops, by whatever way it clears gradients."""
    for clear in ("optimizer", "by hand"):
        params, optimizer = started("sgd", {})
        others, other = started("sgd", {})
        with optimizer.extrapolated():
            (loss_of(params, data(1)) * float("nan")).backward()
        if clear == "optimizer":
            optimizer.zero_grad()
        for p in params:
            p.grad = None
        train(optimizer, params, range(3, 5))
        train(other, others, range(3, 5))
        assert same(params, others)


def test_repeating_a_window_draws_the_same_noise() -> None:
    params, optimizer = started("sgd", {"perturb": "filter", "workers": 2})
    seen = []
    for worker in (0, 1, 0):
        with optimizer.extrapolated(worker):
            seen.append(values(params))
    assert same(seen[0], seen[2])
    assert not any(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))


def test_noise_is_normal_and_differs_between_tensors_steps_and_seeds() -> None:
    def noise(seed: int, steps: int) -> list[Tensor]:
        params = [nn.Parameter(torch.zeros(200, 200)) for _ in range(2)]
        optimizer = ExtrapolatedSGD(params, lr=0.5, extrapolation=4.0, perturb="isotropic", momentum=0.0, seed=seed)
        for _ in range(steps):
            optimizer.step()
        with optimizer.extrapolated():
            return values(params)

    draws = [*noise(0, 0), *noise(0, 1), *noise(1, 0)]
    for draw in draws:
        assert abs(float(draw.mean())) < 0.06
        assert float(draw.std()) == pytest.approx(2.0, rel=0.02)
    correlations = torch.corrcoef(torch.stack([draw.flatten() for draw in draws]))
    assert float((correlations - torch.eye(6)).abs().max()) < 0.03


def test_the_default_generator_is_left_alone() -> None:
    params, optimizer = started("sgd", {"perturb": "filter"})
    state = torch.get_rng_state()
    train(optimizer, params, range(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_gradients_and_frozen_parameters() -> None:
    for kind, options in KINDS:
        used, unused, frozen = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
        frozen.requires_grad_(False)
        optimizer: Any = OPTIMIZERS[kind]([used, unused, frozen], lr=0.1, weight_decay=0.1, **options)
        for _ in range(3):
            with optimizer.extrapolated():
                assert torch.equal(frozen, torch.ones(3))
                (used * frozen).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(unused.detach(), torch.ones(3))
        assert not torch.equal(used.detach(), torch.ones(3))
        assert not optimizer.state.get(unused)


def test_a_worker_without_a_gradient_remembers_nothing() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = ExtrapolatedSGD([a, b], lr=0.1, workers=2)
    for k, p in enumerate((a, b)):
        with optimizer.extrapolated(k):
            (p.sum() / 2).backward()
    optimizer.step()
    assert optimizer.state[a]["local_gradient"].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert optimizer.state[b]["local_gradient"].tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_forgetting_makes_a_plain_step() -> None:
    params, optimizer = started("sgd", {"momentum": 0.0})
    before = values(params)
    optimizer.forget_local_gradients()
    with optimizer.extrapolated():
        assert same(params, before)
        loss_of(params, data(3)).backward()
    optimizer.step()
    with optimizer.extrapolated():
        assert not same(params, before)


def test_memory_of_another_number_of_workers_is_not_used() -> None:
    params, optimizer = started("sgd", {"momentum": 0.0})
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = ExtrapolatedSGD(others, workers=2, momentum=0.0)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["workers"] = 2
    with other.extrapolated(1):
        assert same(others, params)
    train(other, others, range(2))
    assert other.state[others[0]]["local_gradient"].shape == (2, 3, 4)


def test_closures_enter_the_context_themselves() -> None:
    params, optimizer = started("sgd", {})
    others, other = started("sgd", {})

    def closure() -> Tensor:
        optimizer.zero_grad()
        with optimizer.extrapolated():
            loss = loss_of(params, data(3))
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.no_grad():
        assert isinstance(optimizer.step(closure), Tensor)
    train(other, others, range(3, 4))
    assert same(params, others)


def test_follows_a_schedule() -> None:
    param = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = ExtrapolatedSGD([param], lr=1.0, momentum=0.0, extrapolation=3.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    with optimizer.extrapolated():
        param.sum().backward()
    optimizer.step()
    scheduler.step()
    with optimizer.extrapolated():
        assert param.item() == -1.5  # w = 0, g = 1, gamma-hat = 3 * 0.5


def test_weights_that_autocast_has_cast_are_cast_anew() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    optimizer = ExtrapolatedSGD(model.parameters(), perturb="isotropic")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x).detach()
        with optimizer.extrapolated():
            assert not torch.equal(model(x).detach(), before)
        assert torch.equal(model(x).detach(), before)


def test_the_learning_rate_may_be_a_tensor() -> None:
    for kind in OPTIMIZERS:
        params, others = parameters(), parameters()
        train(OPTIMIZERS[kind](params, lr=torch.tensor(0.25)), params, range(3))
        train(OPTIMIZERS[kind](others, lr=0.25), others, range(3))
        assert same(params, others)
