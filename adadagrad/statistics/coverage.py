"""Whether every parameter that received a gradient was counted, and counted rightly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from adadagrad.core.errors import BatchCoupledModule, LeftoverGradients, UncoveredParameter
from adadagrad.statistics.recorder import KeptCall

GradientMarks = dict[nn.Parameter, tuple[int, int]]
"""Identity and version of every gradient, to see afterwards which ones a backward has changed."""


def refuse_batch_coupled(model: nn.Module) -> None:
    """Refuse modules that normalise over the batch.

    Args:
        model: The model to be measured.

    Raises:
        BatchCoupledModule: A BatchNorm (or SyncBatchNorm) computes its statistics from the batch.
    """
    name = batch_coupled_module(model)
    if name is not None:
        raise BatchCoupledModule(
            f"{name} computes its statistics from the whole batch, so a per-example gradient does not exist: use "
            "estimator=MicroBatch(), put it into eval mode, or replace it by GroupNorm"
        )


def batch_coupled_module(model: nn.Module) -> str | None:
    """Return name and class of the first module that normalises over the batch, None if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            return f"{name or 'the model'} ({type(module).__name__})"
    return None


def refuse_leftovers(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse to start a measurement over gradients that are already there.

    Args:
        parameters: The trainable parameters by name.

    Raises:
        LeftoverGradients: A `.grad` is not None.
    """
    for name, p in parameters.items():
        if p.grad is not None:
            raise LeftoverGradients(
                f"{name}.grad holds a gradient from before the measurement; call optimizer.zero_grad() first"
            )


def mark_gradients(parameters: Iterable[nn.Parameter]) -> GradientMarks:
    """Note which gradient tensor each parameter has, and its version.

    Args:
        parameters: The trainable parameters.

    Returns:
        The marks, without those whose gradient is None.
    """
    return {p: (id(p.grad), p.grad._version) for p in parameters if p.grad is not None}


def changed_since(marks: GradientMarks, parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """Return the parameters that a backward has given a gradient since the marks were made.

    Args:
        marks: What `mark_gradients` returned.
        parameters: The trainable parameters.

    Returns:
        Those whose gradient is new or has been added to.
    """
    return {p for p in parameters if p.grad is not None and marks.get(p) != (id(p.grad), p.grad._version)}


def miscounted(kept: Sequence[KeptCall], gradients: Mapping[nn.Parameter, Tensor]) -> set[nn.Parameter]:
    r"""Return the parameters whose per-example gradients do not add up to the gradient that training computed.

    For every parameter with gradient G the rules' sum_i <g_i, G> must be \|G\|^2. It is not where the parameter
    is also used past its layer (a weight tied by a functional call, say), which no tap can see.

    Args:
        kept: All calls of the micro-batch.
        gradients: G of each counted parameter, from this micro-batch alone.

    Returns:
        The parameters that fail the identity by more than rounding.
    """
    sums = dict.fromkeys(gradients, 0.0)
    sizes = dict.fromkeys(gradients, 0.0)
    for entry in kept:
        for name, p in entry.call.parameters.items():
            if p not in gradients:
                continue
            direction = gradients[p].to(entry.gy.dtype)
            products = entry.call.rule.inner_products(entry.call.layer, entry.x, entry.gy, {name: direction})
            sums[p] += float(products.sum())
            sizes[p] += float(products.abs().sum())
    wrong = set()
    for p, gradient in gradients.items():
        expected = float(gradient.double().square().sum())
        if abs(sums[p] - expected) > _tolerance(kept, gradient) * (sizes[p] + expected):
            wrong.add(p)
    return wrong


def check_rerun(sums: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a rerun whose per-example gradients do not add up to the gradient that training computed.

    Args:
        sums: sum_i c_i g_i of the rerun, by qualified name.
        parameters: The same parameters; their `.grad` comes from this micro-batch alone.

    Raises:
        UncoveredParameter: A sum differs by more than rounding: the model draws random numbers or changes state.
    """
    for name, total in sums.items():
        gradient = parameters[name].grad
        expected = torch.zeros_like(total) if gradient is None else gradient
        error = float((total - expected).double().norm())
        if error > _tolerance((), expected) * (1e-30 + float(expected.double().norm())):
            raise UncoveredParameter(
                f"{name}: no rule counts this gradient, and rerunning the model example by example gives another "
                "one (does its forward draw random numbers or depend on state?); use estimator=MicroBatch()"
            )


def _tolerance(kept: Sequence[KeptCall], gradient: Tensor) -> float:
    """Return the relative rounding error to allow, from the coarsest precision in play."""
    types = {gradient.dtype, *(entry.gy.dtype for entry in kept)}
    coarsest = max(torch.finfo(dtype).eps for dtype in types)
    return float(min(0.1, 64 * coarsest**0.75))
