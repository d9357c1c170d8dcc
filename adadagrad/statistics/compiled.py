"""Compiled models: a measured micro-batch runs uncompiled on the same parameters; the other ones' code is kept.

Taps in a compiled graph would be compiled too, once more for each model and batch size, and the patched forwards would
break the graph at every layer. So what `torch.compile` has made of the model or of its parts is passed by while a
micro-batch is measured, and put back behind it, the same objects, so that no guard of the compiled code fails and
nothing is compiled anew. Rounding is that of the uncompiled model then.

Three things can be compiled, and each is passed by in its own way:

- a module wrapped by ``torch.compile(module)``: the wrapper calls the module itself;
- a module compiled in place by ``module.compile()``: its compiled call is taken off;
- a function around the model, or a wrapper that the estimator was not given: compiled code is passed by until the
  model's forward begins (`EagerUntilCalled`). Compiled functions inside the model, an attention kernel say, stay
  compiled. A second call of the model in one micro-batch through such a function is exact, but the function may
  lose its compiled code for new shapes: give the estimator the wrapper.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule, maybe_mark_dynamic

from adadagrad.statistics.taps import patched

_IN_PLACE = "_compiled_call_impl"
"""Where ``module.compile()`` puts the compiled call."""


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is `torch.compile`'s wrapper, or was compiled in place."""
    return module.__dict__.get(_IN_PLACE) is not None or isinstance(module, OptimizedModule)


def compiled_modules(model: nn.Module) -> list[nn.Module]:
    """Return the compiled modules of a model, itself included, outermost first."""
    return [module for module in model.modules() if is_compiled(module)]


def how_it_runs(model: nn.Module, measured: str) -> str:
    """Say in one line how a compiled model runs.

    Args:
        model: The model.
        measured: ``"compiled"`` or ``"uncompiled"``, how its measured micro-batches run.

    Returns:
        The line; empty where nothing of the model is compiled.
    """
    names = [name or "the model" for name, module in model.named_modules() if is_compiled(module)]
    return f"measured micro-batches run {measured}, the others compiled: {', '.join(names)}" if names else ""


def uncompiled(modules: Collection[nn.Module]) -> AbstractContextManager[None]:
    """Let compiled modules run the code that they were compiled from.

    Args:
        modules: Compiled modules.

    Returns:
        A context; they are compiled again after it, also on error.
    """
    return _uncompiled(modules) if modules else nullcontext()


@contextmanager
def _uncompiled(known: Collection[nn.Module]) -> Iterator[None]:
    wrappers: dict[nn.Module, Any] = {m: m._orig_mod.__call__ for m in known if isinstance(m, OptimizedModule)}
    in_place: dict[nn.Module, Any] = {module: None for module in known if module.__dict__.get(_IN_PLACE) is not None}
    with patched("forward", wrappers), patched(_IN_PLACE, in_place):
        yield


def let_batch_size_vary(leaf: Any) -> Any:
    """Tell the compiler that a tensor's first dimension will change, so that it makes one graph for all batch sizes.

    Without it `torch.compile` makes one for the first size and another for all others. A model that computes its inputs
    from the batch (another type, another device) may lose the mark, and has two.

    Args:
        leaf: A tensor with the examples first, or anything else.

    Returns:
        The leaf itself.
    """
    if type(leaf) is Tensor and leaf.dim() > 0:
        maybe_mark_dynamic(leaf, 0)
    return leaf


class EagerUntilCalled:
    """Pass by all compiled code from entering until `release`, which the model's forward calls, or until leaving."""

    def __init__(self) -> None:
        self._stance: Any = None

    def __enter__(self) -> EagerUntilCalled:
        stance: Any = torch.compiler.set_stance("force_eager")
        if (
            stance.prev.stance == "force_eager"
        ):  # of the user, or of another measurement, which puts back what was before
            stance.__exit__(None, None, None)
        else:
            self._stance = stance
        return self

    def release(self) -> None:
        """Let compiled code run as before."""
        stance, self._stance = self._stance, None
        if stance is not None:
            stance.__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
