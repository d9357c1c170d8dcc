r"""The exact fallback: per-example gradients of a few parameters by rerunning the model example by example.

For parameters that no rule can count (used directly in a composite module's forward, in a functional call, or
in a layer that all examples share) the gradient of example i is the vector-Jacobian product of the model on
that example alone with the output gradient that this example received. vmap does a chunk of examples at once.

Cost: about one more forward and backward of the measured examples. Exact for deterministic models; a model that
draws random numbers (dropout) cannot be rerun with the same draw, and is refused. The sum over examples is
compared with the gradient that training computed, so that a wrong attribution never passes for a statistic.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from adadagrad.core.errors import UncoveredParameter
from adadagrad.statistics.rules.base import CHUNK_BYTES

MAX_EXAMPLES_AT_ONCE = 16
"""Examples that one vmapped rerun holds activations for."""


@dataclass(slots=True)
class ModelCall:
    """One call of the model inside a measured micro-batch: its arguments and its outputs' gradients.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        output_gradients: Output leaf number -> gradient of the loss, filled during the backward.
    """

    args: Any
    kwargs: dict[str, Any]
    output_gradients: dict[int, Tensor] = field(default_factory=dict)

    def watch(self, output: Any) -> None:
        """Ask autograd for the gradients of the outputs.

        Args:
            output: What the model returned.
        """
        for number, leaf in enumerate(tree_leaves(output)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._keep, number))  # type: ignore[no-untyped-call]

    def _keep(self, number: int, gradient: Tensor) -> None:
        known = self.output_gradients.get(number)
        self.output_gradients[number] = gradient.detach() if known is None else known + gradient.detach()


def rerun_gradients(
    model: nn.Module, parameters: dict[str, nn.Parameter], call: ModelCall, n: int
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Yield the per-example gradients of the named parameters, a chunk of examples at a time.

    Args:
        model: The model, with its own forward (no taps).
        parameters: The parameters wanted, by qualified name.
        call: The call to redo.
        n: Number of examples; every batched argument and output has them in its first dimension.

    Yields:
        Examples, and name -> (m, *parameter shape) for these m examples.

    Raises:
        UncoveredParameter: The model cannot be rerun example by example.
    """
    leaves, spec = tree_flatten((call.args, call.kwargs))
    batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == n for leaf in leaves]
    numbers = sorted(call.output_gradients)
    gradients = [call.output_gradients[number] for number in numbers]
    names = ", ".join(parameters)
    if not gradients:
        return
    if any(g.dim() == 0 or g.shape[0] != n for g in gradients):
        raise UncoveredParameter(
            f"{names}: no rule counts this gradient, and the model returns a value without a batch dimension, "
            "so it cannot be rerun example by example; compute the loss outside the model, or use "
            "estimator=MicroBatch()"
        )
    rerun = _Rerun(model, parameters, leaves, spec, batched, numbers)
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    length = max(1, min(MAX_EXAMPLES_AT_ONCE, CHUNK_BYTES // max(1, size)))
    for start in range(0, n, length):
        part = slice(start, min(n, start + length))
        inputs = [leaf[part].detach() for leaf, is_batched in zip(leaves, batched, strict=True) if is_batched]
        try:
            yield part, rerun(inputs, [g[part] for g in gradients])
        except RuntimeError as error:
            raise UncoveredParameter(
                f"{names}: no rule counts this gradient, and the model cannot be rerun example by example "
                f"({str(error).splitlines()[0]}); use estimator=MicroBatch()"
            ) from error


class _Rerun:
    """The vmapped vector-Jacobian product of the model on single examples."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        leaves: list[Any],
        spec: TreeSpec,
        batched: list[bool],
        numbers: list[int],
    ) -> None:
        self.model, self.leaves, self.spec, self.batched, self.numbers = model, leaves, spec, batched, numbers
        self.wanted = {name: p.detach() for name, p in parameters.items()}
        self.fixed = {name: p.detach() for name, p in model.named_parameters() if name not in parameters}

    def __call__(self, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        with warnings.catch_warnings():  # that operators without a batching rule are slow has been said already
            warnings.filterwarnings("ignore", message="There is a performance drop")
            found: dict[str, Tensor] = torch.vmap(self._one, randomness="error")(inputs, gradients)
        return found

    def _one(self, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """Return the gradients of one example, given without batch dimension."""
        rows = iter(inputs)
        filled = [next(rows).unsqueeze(0) if b else leaf for leaf, b in zip(self.leaves, self.batched, strict=True)]
        args, kwargs = tree_unflatten(filled, self.spec)

        def outputs(wanted: dict[str, Tensor]) -> tuple[Tensor, ...]:
            result = torch.func.functional_call(self.model, {**self.fixed, **wanted}, args, kwargs)
            leaves = tree_leaves(result)
            return tuple(leaves[number] for number in self.numbers)

        vjp = torch.func.vjp(outputs, self.wanted)[1]
        return vjp(tuple(g.unsqueeze(0) for g in gradients))[0]  # type: ignore[no-any-return]
