r"""The exact fallback: per-example gradients of a few parameters by rerunning the model example by example.

For parameters that no rule can count (used directly in a composite module's forward, in a functional call, or
in a layer that all examples share) the gradient of example i is the vector-Jacobian product of the model on
that example alone with the output gradient that this example received. vmap does a chunk of examples at once;
where it cannot (recurrent kernels, routing by value, a change in place), examples go one at a time.

Cost: about one more forward and backward of the measured examples, one at a time in the latter case. Exact for
deterministic models; a model that draws random numbers (dropout) cannot be rerun with the same draw, and is
refused. The sum over examples is compared with the gradient that training computed, so that a wrong attribution
never passes for a statistic.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from adadagrad.core.errors import UncoveredParameter
from adadagrad.statistics.compiled import compiled_modules, uncompiled
from adadagrad.statistics.rules.chunking import room
from adadagrad.statistics.trials import untouched

MAX_EXAMPLES_AT_ONCE = 16
"""Examples that one vmapped rerun holds activations for."""


@dataclass(slots=True)
class ModelCall:
    """One call of the model inside a measured micro-batch: its arguments and its outputs' gradients.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        autocast: Precision that autocast computed in, by device type; none where it was off.
        output_gradients: Output leaf number -> gradient of the loss, filled during the backward.
    """

    args: Any
    kwargs: dict[str, Any]
    autocast: dict[str, torch.dtype]
    output_gradients: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def now(cls, args: Any, kwargs: dict[str, Any]) -> ModelCall:
        """Return a call that is about to happen with these arguments."""
        kinds = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return cls(args, kwargs, {k: torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)})

    @property
    def types(self) -> set[torch.dtype]:
        """Precisions that the call computed in, as far as its outputs and autocast tell."""
        return {*self.autocast.values(), *(g.dtype for g in self.output_gradients.values())}

    def watch(self, output: Any) -> Any:
        """Ask autograd for the gradients that reach the outputs from outside the model.

        Args:
            output: What the model returned.

        Returns:
            The same with copies of its tensors, so that one output that the model computes from another, or
            returns twice, has a gradient of its own.
        """
        leaves, spec = tree_flatten(output)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaves[number] = leaf.clone()
                leaves[number].register_hook(partial(self._keep, number))
        return tree_unflatten(leaves, spec)

    def _keep(self, number: int, gradient: Tensor | None) -> None:
        if gradient is None:  # an output that the loss leaves out, behind DistributedDataParallel
            return
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
    if any(g.dim() == 0 or g.shape[0] != n for g in gradients):
        raise UncoveredParameter(
            f"{names}: no rule counts this gradient, and the model returns a value without a batch dimension, "
            "so it cannot be rerun example by example; compute the loss outside the model, or use "
            "estimator=MicroBatch()"
        )
    rerun = _Rerun(model, parameters, leaves, spec, batched, numbers)
    autocasts = [torch.autocast(kind, dtype) for kind, dtype in call.autocast.items()]
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    length = max(1, min(MAX_EXAMPLES_AT_ONCE, room(gradients[0]) // max(1, size)))
    for start in range(0, n, length):
        part = slice(start, min(n, start + length))
        inputs = [leaf[part].detach() for leaf, is_batched in zip(leaves, batched, strict=True) if is_batched]
        try:
            with ExitStack() as stack:
                stack.enter_context(untouched(model))
                stack.enter_context(uncompiled(compiled_modules(model)))
                for autocast in autocasts:
                    stack.enter_context(autocast)
                found = rerun(inputs, [g[part] for g in gradients])
        except Exception as error:
            raise UncoveredParameter(
                f"{names}: no rule counts this gradient, and the model cannot be rerun example by example "
                f"({str(error).partition(chr(10))[0]}); use estimator=MicroBatch()"
            ) from error
        yield part, found


class _Rerun:
    """The vector-Jacobian products of the model on single examples, vmapped or one at a time."""

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
        self.places = _places(model)
        self.together = True

    def __call__(self, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """Return name -> (m, *parameter shape) for m examples."""
        if self.together:
            try:
                with warnings.catch_warnings():  # that operators without a batching rule are slow has been said
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    found: dict[str, Tensor] = torch.vmap(self._one, randomness="error")(inputs, gradients)
                return found
            except Exception as error:
                if "random" in str(error):
                    raise
                self.together = False
        rows = [self._alone([x[i] for x in inputs], [g[i] for g in gradients]) for i in range(len(gradients[0]))]
        return {name: torch.stack([row[name] for row in rows]) for name in self.wanted}

    def _one(self, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """Return the gradients of one example, given without batch dimension, inside vmap."""
        vjp = torch.func.vjp(lambda wanted: self._outputs(wanted, inputs), self.wanted)[1]
        return vjp(tuple(g.unsqueeze(0) for g in gradients))[0]  # type: ignore[no-any-return]

    def _alone(self, inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """Return the same by an ordinary backward."""
        wanted = {name: p.clone().requires_grad_() for name, p in self.wanted.items()}
        with torch.enable_grad():
            pairs = zip(self._outputs(wanted, inputs), gradients, strict=True)
            reached = [(y, g.unsqueeze(0)) for y, g in pairs if y.requires_grad]
        if not reached:
            return {name: torch.zeros_like(p) for name, p in self.wanted.items()}
        outputs, output_gradients = zip(*reached, strict=True)
        found = torch.autograd.grad(outputs, list(wanted.values()), output_gradients, materialize_grads=True)
        return dict(zip(wanted, found, strict=True))

    def _outputs(self, wanted: dict[str, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the watched outputs of the model for one example, given without batch dimension."""
        rows = iter(inputs)
        filled = [next(rows).unsqueeze(0) if b else leaf for leaf, b in zip(self.leaves, self.batched, strict=True)]
        args, kwargs = tree_unflatten(filled, self.spec)
        values = {**self.fixed, **wanted}
        filled_places = {place: values[name] for place, name in self.places.items()}
        result = torch.func.functional_call(self.model, filled_places, args, kwargs, tie_weights=False)
        leaves = tree_leaves(result)
        return tuple(leaves[number] for number in self.numbers)


def _places(model: nn.Module) -> dict[str, str]:
    """Return, for every place of a parameter in the model, the first name of the parameter that lies there.

    A module that the model holds under two names comes once: torch's own tying would exchange its parameters twice
    and put back the first exchange instead of them, so that an optimizer would go on with tensors that the model no
    longer has.

    Returns:
        Name of a place -> name of its parameter.
    """
    names = {p: name for name, p in model.named_parameters()}
    return {
        f"{path}.{own}" if path else own: names[p]
        for path, module in model.named_modules()
        for own, p in module.named_parameters(recurse=False, remove_duplicate=False)
    }
