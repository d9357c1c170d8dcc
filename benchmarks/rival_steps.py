"""Training steps that deliver every example's squared gradient norm, each the way its library's user would write it.

Every step is forward, backward with a mean loss, the squared norms |g_i|^2 (or V), update (Adagrad) and zero_grad. The
published approach and the released packages are the alternatives to `ada.PerExample`:

- "vmap": the published approach. A plain step; beside it the model is copied and `torch.func` forms every example's
  gradient of every parameter in one vmapped call. Norms are taken from those.
- "Opacus ghost": `GradSampleModuleFastGradientClipping` with ghost clipping (its default) forms per-sample norms in the
  backward. Its second, clipped backward is left out: nobody who only wants norms runs it.
- "Opacus samples": `GradSampleModule` with its own rules (its default) stores per-sample gradients; norms from those.
- "BackPACK L2" and "BackPACK variance": the first-order extensions `BatchL2Grad` and `Variance`, default settings.

Packages are imported only when a step is made, so that this file can be read and tested without them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.statistics.base import AbstractEstimator
from benchmarks.models import Workload

Step = Callable[[], Any]
Made = tuple[nn.Module, Step]


def plain(work: Workload, x: Tensor, y: Tensor) -> Made:
    """Return a model and its plain step: the measure of all others."""
    model, optimizer = work.fresh()

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def metered(estimator: AbstractEstimator, work: Workload, x: Tensor, y: Tensor) -> Made:
    """Return a model and a step measured by one of our estimators; the step returns its statistics."""
    model, optimizer = work.fresh()
    meter = ada.GradientMeter(model, estimator)

    def step() -> ada.GradientStatistics:
        with meter:
            F.cross_entropy(model(x), y).backward()
        statistics = meter.statistics()
        optimizer.step()
        optimizer.zero_grad()
        return statistics

    return model, step


def vmapped(work: Workload, x: Tensor, y: Tensor) -> Made:
    """Return a model and a plain step with the published measurement beside it."""
    model, optimizer = work.fresh()

    def step() -> Tensor:
        twin = copy.deepcopy(model)

        def loss(parameters: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
            output = torch.func.functional_call(twin, parameters, (row.unsqueeze(0),))
            return F.cross_entropy(output, target.unsqueeze(0))

        parameters = {name: p.detach() for name, p in twin.named_parameters()}
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
        norms = squares(list(gradients.values()))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        return norms

    return model, step


def opacus_ghost(work: Workload, x: Tensor, y: Tensor) -> Made:
    """Return a model and a step in which Opacus forms per-sample norms."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, optimizer = work.fresh()
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="mean", use_ghost_clipping=True)

    def step() -> Tensor:
        F.cross_entropy(wrapped(x), y).backward()
        norms = wrapped.get_norm_sample().square()
        optimizer.step()
        optimizer.zero_grad()
        return norms

    return model, step


def opacus_samples(work: Workload, x: Tensor, y: Tensor) -> Made:
    """Return a model and a step in which Opacus stores per-sample gradients."""
    from opacus.grad_sample import GradSampleModule

    model, optimizer = work.fresh()
    wrapped = GradSampleModule(model, loss_reduction="mean")
    parameters: list[Any] = list(model.parameters())

    def step() -> Tensor:
        F.cross_entropy(wrapped(x), y).backward()
        norms = squares([p.grad_sample for p in parameters])
        wrapped.set_grad_sample_to_none()
        optimizer.step()
        optimizer.zero_grad()
        return norms

    return model, step


def backpack_extension(name: str, work: Workload, x: Tensor, y: Tensor) -> Made:
    """Return a model and a step in which BackPACK forms `BatchL2Grad` (the norms) or `Variance` (V)."""
    from backpack import backpack, extend, extensions

    model, optimizer = work.fresh()
    extend(model)
    loss_function = extend(nn.CrossEntropyLoss())
    extension = getattr(extensions, name)()
    parameters: list[Any] = list(model.parameters())
    n = len(x)

    def step() -> Tensor:
        loss = loss_function(model(x), y)
        with backpack(extension):
            loss.backward()
        if name == "BatchL2Grad":  # of g_i / n, because the loss is a mean
            result = torch.stack([p.batch_l2 for p in parameters]).sum(0) * n**2
        else:  # of g_i / n, and with n instead of n - 1
            result = torch.stack([p.variance.sum() for p in parameters]).sum() * n**2 * (n / (n - 1))
        optimizer.step()
        optimizer.zero_grad()
        return result

    return model, step


def squares(gradients: list[Tensor]) -> Tensor:
    """Return |g_i|^2, shape (n,), from every example's gradient of every parameter, shapes (n, ...)."""
    return torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0).square()
