r"""Any layer whose forward is deterministic: its own vector-Jacobian product on every example, vmapped.

The gradient of example i is the vector-Jacobian product of the layer on the recorded arguments of that example alone
with the gradient that its outputs received. Only this layer runs again, on values that it has seen; what the rest of
the model draws at random does not matter. Where vmap cannot go (a decision by value, a recurrent kernel), examples go
one at a time.

Cost: about one more forward and backward of the layer (one at a time in the latter case). Memory: activations and
gradients of a few examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.per_example_sums import products_per_example, squares_per_example
from adadagrad.statistics.rules.whole import AbstractWholeRule, Part, RecordedCall

MAX_EXAMPLES_AT_ONCE = 16
"""Examples that hold activations at a time."""


class GenericRule(AbstractWholeRule[nn.Module]):
    """Exact rule for any layer that draws no random numbers, keeps no state and does not mix examples."""

    def suits(self, layer: nn.Module) -> bool:
        """Return True: whether a call can be redone shows when it is made."""
        return True

    def may_draw(self, layer: nn.Module) -> bool:
        """Return False: the numbers cannot be drawn again for one example."""
        return False

    def parts(self, call: RecordedCall, gradients: Sequence[Tensor | None], names: Collection[str]) -> list[Part]:
        """Return the call as one part whose input is the numbers of its examples."""
        if min(call.dims, default=0) < -1:
            raise ValueError("an argument cannot be taken apart into examples")
        known = [(dim, g) for dim, g in zip(call.output_dims, gradients, strict=True) if g is not None]
        n = known[0][1].shape[known[0][0]]
        rows = torch.arange(n, device=known[0][1].device)
        rule = ExampleRule(call, gradients)
        rule.gradients(call.layer, rows[:1], rows[:1], names)  # if it fails, it fails here, and the fallback counts
        return [Part(rule, rows, known[0][1].movedim(known[0][0], 0), {name: name for name in names})]


class ExampleRule(AbstractRule[nn.Module]):
    """Exact rule for one recorded call; the input x is numbers of examples, the output gradient is not asked.

    Args:
        call: The call.
        gradients: The gradients of its outputs, None for 0.
    """

    def __init__(self, call: RecordedCall, gradients: Sequence[Tensor | None]) -> None:
        self._call = call
        pairs = enumerate(zip(call.output_dims, gradients, strict=True))
        known = {number: g.detach().movedim(dim, 0) for number, (dim, g) in pairs if g is not None}
        self._numbers, self._gradients = list(known), list(known.values())
        self._batched = [number for number, dim in enumerate(call.dims) if dim >= 0]
        self._together = True

    def accepts(self, layer: nn.Module, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return True: the trial runs have found the examples."""
        return True

    def gradients(self, layer: nn.Module, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the gradients of these examples (m, *parameter shape)."""
        pieces = [found for _, found in self._pieces(layer, x, names)]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in names}

    def square_norms(self, layer: nn.Module, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms, a few examples at a time."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for part, gradients in self._pieces(layer, x, names):
            for gradient in gradients.values():
                total[part] += squares_per_example(gradient)
        return total

    def inner_products(self, layer: nn.Module, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return the products with the gradients, a few examples at a time."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for part, gradients in self._pieces(layer, x, set(directions)):
            for name, gradient in gradients.items():
                total[part] += products_per_example(gradient, directions[name])
        return total

    def _pieces(self, layer: nn.Module, x: Tensor, names: Collection[str]) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        parameters = dict(layer.named_parameters())
        wanted = {name: parameters[name].detach() for name in names}
        size = sum(p.numel() * p.element_size() for p in wanted.values())
        for part in chunks(len(x), size, room(x)):
            for start in range(part.start, part.stop, MAX_EXAMPLES_AT_ONCE):
                few = slice(start, min(part.stop, start + MAX_EXAMPLES_AT_ONCE))
                yield few, self._some(wanted, x[few])

    def _some(self, wanted: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Return the gradients of a few examples."""
        leaves, dims = self._call.leaves, self._call.dims
        inputs = [leaves[number].movedim(dims[number], 0)[rows] for number in self._batched]
        gradients = [gradient[rows] for gradient in self._gradients]
        if self._together:
            try:
                with warnings.catch_warnings():  # that operators without a batching rule are slow is known here
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    found: dict[str, Tensor] = torch.vmap(self._one, in_dims=(None, 0, 0), randomness="error")(
                        wanted, inputs, gradients
                    )
                return found
            except Exception:
                self._together = False
        alone = [self._alone(wanted, [x[i] for x in inputs], [g[i] for g in gradients]) for i in range(len(rows))]
        return {name: torch.stack([row[name] for row in alone]) for name in wanted}

    def _one(self, wanted: dict[str, Tensor], inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """Return the gradients of one example, given without batch dimension, inside vmap."""
        vjp = torch.func.vjp(lambda parameters: self._outputs(parameters, inputs), wanted)[1]
        return vjp(self._single(gradients))[0]  # type: ignore[no-any-return]

    def _alone(self, wanted: dict[str, Tensor], inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """Return the same by an ordinary backward."""
        with torch.enable_grad():
            parameters = {name: p.clone().requires_grad_() for name, p in wanted.items()}
            pairs = zip(self._outputs(parameters, inputs), self._single(gradients), strict=True)
            reached = [(y, g) for y, g in pairs if y.requires_grad]
        if not reached:
            return {name: torch.zeros_like(p) for name, p in wanted.items()}
        outputs, output_gradients = zip(*reached, strict=True)
        found = torch.autograd.grad(outputs, list(parameters.values()), output_gradients, materialize_grads=True)
        return dict(zip(parameters, found, strict=True))

    def _outputs(self, parameters: dict[str, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs that have a gradient, for one example, given without batch dimension."""
        leaves = list(self._call.leaves)
        for number, x in zip(self._batched, inputs, strict=True):
            leaves[number] = x.unsqueeze(self._call.dims[number])
        found = self._call.redo(parameters, leaves)
        return tuple(found[number] for number in self._numbers)

    def _single(self, gradients: list[Tensor]) -> tuple[Tensor, ...]:
        dims = [self._call.output_dims[number] for number in self._numbers]
        return tuple(g.unsqueeze(dim) for g, dim in zip(gradients, dims, strict=True))
