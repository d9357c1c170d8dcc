"""The model under test is as it was, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.apps.universal_perturbation import CraftingStep, evaluate, find_universal_perturbation, transfer_matrix
from adadagrad.core.errors import InvalidArgument, LossWithoutGradient, NonFiniteGradient
from tests.apps.universal_perturbation.cases import labelled, network, some_images


def borrowed() -> nn.Module:
    """Normalisation and dropout in it, a frozen layer, and gradients left over from somebody's training."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(36, 3)]
    model = nn.Sequential(*layers).double()
    model.train()(torch.rand(8, 1, 5, 5, dtype=torch.float64)).square().sum().backward()
    model.eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = None
    return model


def state(model: nn.Module) -> list[Any]:
    params = [(p.clone(), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]  # the very same tensors
    return [params, grads, [b.clone() for b in model.buffers()], [m.training for m in model.modules()]]


def assert_untouched(model: nn.Module, before: list[Any]) -> None:
    params, grads, buffers, modes = before
    for param, (value, requires_grad, grad), same in zip(model.parameters(), params, grads, strict=True):
        assert torch.equal(param, value)
        assert param.requires_grad is requires_grad
        assert param.grad is same
        assert grad is None or (param.grad is not None and torch.equal(param.grad, grad))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("method", ["sga", "spgd", "aggregation", "random"])
def test_search_and_evaluation_leave_it_alone(method: str) -> None:
    model = borrowed()
    before = state(model)
    found = find_universal_perturbation(model, some_images(), 0.2, method=method, epochs=2)
    report = evaluate(model, found, [labelled()])
    transfer_matrix({"a": found}, {"b": model}, [labelled()])
    assert_untouched(model, before)
    assert report.n_samples == 40
    assert not any(hooks for module in model.modules() for hooks in (module._forward_hooks, module._backward_hooks))


def interrupt(step: CraftingStep) -> None:
    if step.step == 2:
        raise KeyboardInterrupt


class Broken(nn.Module):
    """Breaks in one way or another after it has been looked at."""

    def __init__(self, model: nn.Module, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.how = model, how
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x)
        return self.how(output)


def fail(_: Tensor) -> Tensor:
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        (lambda x: x * float("nan"), NonFiniteGradient, "the gradient with respect to the perturbation is not finite"),
        (lambda x: x.detach(), LossWithoutGradient, "remove torch.no_grad"),
        (fail, RuntimeError, "out of order"),
        (lambda x: x[:, 0], InvalidArgument, r"must return logits \(n, classes\) with at least two classes, got shape"),
    ],
    ids=["nan", "detached", "failing", "no logits"],
)
def test_an_error_leaves_it_alone(how: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    model = borrowed()
    before = state(model)
    with pytest.raises(error, match=message):
        find_universal_perturbation(Broken(model, how), some_images(), 0.2)
    assert_untouched(model, before)


def test_a_callback_may_stop_the_search() -> None:
    model = borrowed()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        find_universal_perturbation(model, some_images(), 0.2, progress=interrupt)
    assert_untouched(model, before)


def test_a_model_that_ignores_its_input_is_refused() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight.expand(len(x), 3)

    with pytest.raises(LossWithoutGradient, match="logits do not depend on the images"):
        find_universal_perturbation(Constant().eval(), some_images(), 0.2)


@pytest.mark.parametrize("method", ["spgd", "aggregation"])
def test_the_loss_that_the_callback_sees_is_the_mean_over_the_images_of_the_step(method: str) -> None:
    """The first step is taken at delta = 0, so that its loss is that of clean images."""
    model, images, losses = network(), some_images(), list[float]()
    settings: dict[str, Any] = {"method": method, "k": 1, "small_batch": 24, "large_batch": 24, "epochs": 2}
    find_universal_perturbation(model, images, 0.2, progress=lambda step: losses.append(step.loss), **settings)
    logits = model(images)
    assert losses[0] == pytest.approx(float(F.cross_entropy(logits, logits.argmax(1)).detach()), rel=1e-12)
    assert 0.9 * losses[0] < losses[1] < 2 * losses[0]  # not the sum of both


def test_the_callback_sees_every_step_and_a_copy() -> None:
    steps: list[CraftingStep] = []

    def spoil(step: CraftingStep) -> None:
        steps.append(step)
        step.delta.zero_()

    settings: dict[str, Any] = {"large_batch": 10, "epochs": 2}
    seen = find_universal_perturbation(network(), some_images(), 0.2, progress=spoil, **settings)
    assert torch.equal(seen.delta, find_universal_perturbation(network(), some_images(), 0.2, **settings).delta)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert {step.steps for step in steps} == {6}
    assert [step.epoch for step in steps] == [1, 1, 1, 2, 2, 2]
    assert [step.gradient_count for step in steps] == [40, 80, 84, 124, 164, 168]
    assert all(0 < step.loss < 9 for step in steps)
