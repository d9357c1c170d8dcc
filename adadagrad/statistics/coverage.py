"""Whether every parameter that received a gradient was counted, and counted rightly."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from adadagrad.core.errors import BatchCoupledModule, LeftoverGradients, UncoveredParameter
from adadagrad.core.vectors import squared_norm
from adadagrad.statistics.calls import KeptCall

_TABLES = (nn.Embedding, nn.EmbeddingBag)

GradientMarks = dict[nn.Parameter, tuple[int, int]]
"""Identity and version of every gradient, to see afterwards which ones a backward has changed."""


def refuse_batch_coupled(found: tuple[str, nn.Module] | None) -> None:
    """Refuse a model that normalises over the batch.

    Args:
        found: Name and module of the first part of it that does, if any.

    Raises:
        BatchCoupledModule: A BatchNorm (or SyncBatchNorm) computes its statistics from the batch, or an embedding
            divides gradients by how often a token occurs in it.
    """
    if found is not None:
        raise BatchCoupledModule(
            f"{_words(*found)} computes its statistics from the whole batch, so a per-example gradient does not exist: "
            "use estimator=MicroBatch(), put a BatchNorm into eval mode or replace it by GroupNorm, build an Embedding "
            "without scale_grad_by_freq"
        )


def batch_coupled_module(model: nn.Module) -> str | None:
    """Return name and class of the first module that normalises over the batch, None if there is none."""
    for name, module in model.named_modules():
        if is_batch_coupled(module):
            return _words(name, module)
    return None


def is_batch_coupled(module: nn.Module) -> bool:
    """Return whether the module by itself, as it is now, gives an example a gradient that depends on the others."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    if isinstance(module, _TABLES):  # divides by how often the whole batch holds a token
        return module.scale_grad_by_freq and module.weight.requires_grad
    return False


def _words(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


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
        The parameters that fail the identity by more than rounding; a gradient with NaN is not judged.
    """
    sums = dict.fromkeys(gradients, 0.0)
    sizes = dict.fromkeys(gradients, 0.0)
    for entry in kept:
        for p in set(entry.call.parameters.values()) & gradients.keys():
            products = entry.inner_products({p: gradients[p]})
            if products is not None:
                sums[p] += float(products.sum())
                sizes[p] += float(products.abs().sum())
    types = {entry.gy.dtype for entry in kept}
    squares = {p: float(squared_norm([gradient])) for p, gradient in gradients.items()}
    spare = negligible({*types, *(g.dtype for g in gradients.values())}) ** 2 * sum(squares.values())
    return {
        p
        for p, square in squares.items()
        if abs(sums[p] - square) > spare + tolerance({gradients[p].dtype, *types}) * (sizes[p] + square)
    }


def check_rerun(
    sums: Mapping[str, Tensor],
    expected: Mapping[str, Tensor | None],
    whole: Collection[Tensor],
    types: Collection[torch.dtype],
) -> None:
    """Refuse a rerun whose per-example gradients do not add up to the gradient that training computed.

    Args:
        sums: sum_i c_i g_i of the rerun, by qualified name; a missing one is 0.
        expected: This micro-batch's gradient of every parameter that the rerun counts; None is 0.
        whole: The gradients of all parameters, for what is negligible beside them.
        types: Precisions that the model computed in.

    Raises:
        UncoveredParameter: A sum differs by more than rounding: the model draws random numbers or changes state.
    """
    spare = negligible({*types, *(g.dtype for g in whole)}) * float(squared_norm(list(whole))) ** 0.5
    for name, gradient in expected.items():
        parts = [t.double() for t in (sums.get(name), gradient) if t is not None]
        error = float((parts[0] - parts[1] if len(parts) == 2 else sum(parts, torch.zeros(()))).norm())
        norm = 0.0 if gradient is None else float(gradient.double().norm())
        if error > spare + tolerance({*types, *(t.dtype for t in (gradient,) if t is not None)}) * norm:
            raise UncoveredParameter(
                f"{name}: no rule counts this gradient, and rerunning the model example by example gives another "
                "one (does its forward draw random numbers or depend on state, or does the loss use the parameter or "
                "an inner value directly?); use estimator=MicroBatch()"
            )


def tolerance(types: Collection[torch.dtype]) -> float:
    """Return the relative rounding error to allow, from the coarsest precision in play.

    At most a quarter: torch itself loses an eighth of a LayerNorm's gradient in bfloat16 on a CPU.
    """
    return float(min(0.25, 64 * _coarsest(types) ** 0.75))


def negligible(types: Collection[torch.dtype]) -> float:
    """Return the share of the whole gradient's norm below which a gradient may be nothing but rounding.

    The bias of an attention key has gradient zero, up to rounding, and so nothing to be compared with.

    Args:
        types: Precisions of gradients and of what they were computed from.
    """
    return min(0.1, 1024 * _coarsest(types))


def _coarsest(types: Collection[torch.dtype]) -> float:
    return max((torch.finfo(dtype).eps for dtype in types), default=0.0)
