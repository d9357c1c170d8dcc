"""One measured micro-batch after its backward: what its examples' gradients are, asked in three ways.

Parameters used in one call have their norms from that call's rule. Where several calls share a parameter (tied
weights, a module called twice) the calls' gradients are added per example before they are squared; the squares
alone would miss the cross terms. Inner products are linear and simply add.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import copy

import torch
from torch import Tensor, nn

from adadagrad.statistics.calls import KeptCall
from adadagrad.statistics.fallback import rerun_gradients
from adadagrad.statistics.recorder import Recorder
from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.per_example_sums import products_per_example, squares_per_example, weighted_squares


class Examples:
    """The examples of one micro-batch.

    Args:
        model: The model, its forwards no longer patched.
        recorder: What the taps delivered and kept.
        fallback: Parameters to count by rerunning the model, by qualified name.
    """

    def __init__(self, model: nn.Module, recorder: Recorder, fallback: Mapping[str, nn.Parameter]) -> None:
        assert recorder.leaf is not None
        self.n = len(recorder.leaf)
        self._model, self._fallback = model, dict(fallback)
        self._leaf, self._kept = recorder.leaf, recorder.intake.kept
        self._model_calls = [call for call in recorder.model_calls if call.output_gradients]
        self._excluded = set(fallback.values())
        self.types = {entry.gy.dtype for entry in self._kept}
        """Precisions that the model computed in, as far as they are known."""
        for call in self._model_calls:
            self.types.update(call.types)
        self.rerun_sums: dict[str, Tensor] = {}
        """sum_i c_i g_i of the fallback's parameters, after `square_norms`."""
        self._uses: dict[nn.Parameter, list[tuple[KeptCall, str]]] = defaultdict(list)
        self._find_uses()

    def _find_uses(self) -> None:
        for entry in self._kept:
            for name, p in entry.call.parameters.items():
                if p not in self._excluded:
                    self._uses[p].append((entry, name))

    def square_norms(self) -> Tensor:
        r"""Return \|c_i g_i\|^2 over all parameters, float64 (n,)."""
        total = self._leaf.grad
        if not self._kept and not self._fallback and total is not None:
            return total
        total = torch.zeros_like(self._leaf) if total is None else total.clone()
        for entry in self._kept:
            single = {
                name
                for name, p in entry.call.parameters.items()
                if name in entry.names and len(self._uses.get(p, ())) == 1
            }
            if single:
                total += entry.call.rule.square_norms(entry.call.layer, entry.x, entry.gy, single)
        for p, uses in self._uses.items():
            if len(uses) > 1:
                for part, gradient in self._summed(p, uses):
                    total[part] += squares_per_example(gradient)
        for part, gradients in self._rerun():
            for name, gradient in gradients.items():
                total[part] += squares_per_example(gradient)
                self.rerun_sums[name] = self.rerun_sums.get(name, torch.tensor(0.0)) + gradient.sum(0)
        return total

    @property
    def device(self) -> torch.device:
        """Where the numbers per example are."""
        return self._leaf.device

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the kept calls count."""
        return list(self._uses)

    def pieces_in_double(self) -> Iterator[tuple[slice, Examples]]:
        """Yield the kept calls with their tensors in float64, a few examples at a time, without the fallback."""
        size = 8 * sum((entry.x.numel() + entry.gy.numel()) // self.n for entry in self._kept)
        for part in chunks(self.n, size, room(self._leaf)):
            few = copy(self)
            few._leaf, few._fallback, few._uses = self._leaf.detach()[part], {}, defaultdict(list)
            few.n = len(few._leaf)
            few._kept = [
                KeptCall(call.call, _wide(call.x[part]), _wide(call.gy[part]), frozenset(call.call.parameters))
                for call in self._kept
            ]
            few._find_uses()
            yield part, few

    def rerun(self) -> Iterator[tuple[slice, dict[nn.Parameter, Tensor]]]:
        """Yield the fallback's per-example gradients, a few examples at a time."""
        for part, gradients in self._rerun():
            yield part, {self._fallback[name]: gradient for name, gradient in gradients.items()}

    def inner_products(self, directions: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Return <c_i g_i, direction> over all parameters, float64 (n,).

        Args:
            directions: Parameter -> tensor of its shape; a parameter that is missing has direction 0.

        Returns:
            float64 (n,).
        """
        total = torch.zeros_like(self._leaf)
        counted = {p: direction for p, direction in directions.items() if p not in self._excluded}
        for entry in self._kept:
            products = entry.inner_products(counted)
            if products is not None:
                total += products
        for part, gradients in self._rerun():
            for name, gradient in gradients.items():
                if self._fallback[name] in directions:
                    total[part] += products_per_example(gradient, directions[self._fallback[name]])
        return total

    def weighted_square_sums(self, weights: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield sum_i w_i (c_i g_ij)^2 of every parameter, coordinate by coordinate.

        Args:
            weights: w_i, float64 (n,); 1/c_i makes it sum c_i g_ij^2.

        Yields:
            Parameter and float64 tensor of its shape.
        """
        equal = bool((weights == weights[:1]).all())
        for entry in self._kept:
            call, known = entry.call, entry.call.square_sums.totals
            single = {name: p for name, p in call.parameters.items() if len(self._uses.get(p, ())) == 1}
            if equal and single and single.keys() <= known.keys():
                yield from ((p, known[name] * weights[0]) for name, p in single.items())
            elif single:
                sums = call.rule.square_sums(call.layer, entry.x, entry.gy, single, weights)
                yield from ((single[name], total) for name, total in sums.items())
        for p, uses in self._uses.items():
            if len(uses) > 1:
                total = torch.zeros_like(p, dtype=torch.float64)
                for part, gradient in self._summed(p, uses):
                    total += weighted_squares(gradient, weights[part])
                yield p, total
        rerun: dict[str, Tensor] = {}
        for part, gradients in self._rerun():
            for name, gradient in gradients.items():
                rerun[name] = rerun.get(name, torch.tensor(0.0)) + weighted_squares(gradient, weights[part])
        for name, total in rerun.items():
            yield self._fallback[name], total

    def _summed(self, p: nn.Parameter, uses: list[tuple[KeptCall, str]]) -> Iterator[tuple[slice, Tensor]]:
        """Yield the per-example gradients of a parameter, added over its calls, a chunk at a time."""
        sizes = [
            entry.call.rule.bytes_per_example(entry.call.layer, entry.x, entry.gy, {name: p}) for entry, name in uses
        ]
        for part in chunks(self.n, max(sizes), room(self._leaf)):
            gradients = [
                entry.call.rule.gradients(entry.call.layer, entry.x[part], entry.gy[part], {name})[name]
                for entry, name in uses
            ]
            yield part, torch.stack(gradients).sum(0) if len(gradients) > 1 else gradients[0]

    def _rerun(self) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Yield the fallback's per-example gradients, added over the model's calls."""
        if not self._fallback or not self._model_calls:
            return
        streams = [rerun_gradients(self._model, self._fallback, call, self.n) for call in self._model_calls]
        for pieces in zip(*streams, strict=True):
            part = pieces[0][0]
            yield (
                part,
                {name: sum((piece[1][name] for piece in pieces), torch.tensor(0.0)) for name in pieces[0][1]},
            )


def _wide(values: Tensor) -> Tensor:
    return values.double() if values.is_floating_point() else values
