r"""Bilinear: the weight's gradient is a product of three factors, y_o = x^T W_o z + bias_o.

With X_i (T x d), Z_i (T x e) the inputs and B_i (T x p) the output gradient of example i, the gradient of W is
sum_t b_t x_t z_t, of p d e elements, and

- T = 1: |g_i|^2 = |b|^2 |x|^2 |z|^2;
- T > 1: |g_i|^2 = sum (B_i B_i^T) * (X_i X_i^T) * (Z_i Z_i^T), 2 T^2 (p + d + e) flop, or the gradient itself,
  2 T p d e flop, whichever is less.

The two inputs come here side by side, as one tensor (n, T, d + e).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.statistics.rules.base import AbstractRule
from adadagrad.statistics.rules.chunking import chunks, room
from adadagrad.statistics.rules.per_example_sums import (
    at_least_single,
    products_per_example,
    squares_per_example,
    sum_per_example,
)
from adadagrad.statistics.rules.whole import AbstractWholeRule, Part, RecordedCall


class BilinearRule(AbstractWholeRule[nn.Bilinear]):
    """Exact rule for `torch.nn.Bilinear` with any number of positions per example."""

    def suits(self, layer: nn.Bilinear) -> bool:
        """Return True."""
        return True

    def may_draw(self, layer: nn.Bilinear) -> bool:
        """Return False: it draws nothing."""
        return False

    def parts(self, call: RecordedCall, gradients: Sequence[Tensor | None], names: Collection[str]) -> list[Part]:
        """Return the call as one product of three factors."""
        (gy,), (dim,) = gradients, call.output_dims
        args, kwargs = call.arguments
        found = [args[k] if k < len(args) else kwargs[name] for k, name in enumerate(("input1", "input2"))]
        where = {id(leaf): place for leaf, place in zip(call.leaves, call.dims, strict=True)}
        if gy is None or any(where[id(x)] != dim or dim >= x.dim() - 1 for x in found):
            raise ValueError("the examples are not in the same dimension of both inputs and the output")
        gy, *inputs = (t.movedim(dim, 0).flatten(1, -2) if t.dim() > 2 else t.unsqueeze(1) for t in (gy, *found))
        return [Part(_TripleProduct(), torch.cat(inputs, 2).to(gy.dtype), gy, {name: name for name in names})]


class _TripleProduct(AbstractRule[nn.Bilinear]):
    """Exact rule for inputs side by side (n, T, d + e) and output gradient (n, T, p)."""

    def accepts(self, layer: nn.Bilinear, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return True: the examples come first."""
        return True

    def gradients(self, layer: nn.Bilinear, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return (n, p, d, e) and (n, p)."""
        found = {}
        if "weight" in names:
            left, right = _inputs(layer, x)
            outer = (gy.unsqueeze(3) * left.unsqueeze(2)).flatten(2)  # (n, T, p d)
            found["weight"] = torch.bmm(outer.mT, right).view(len(x), *layer.weight.shape)
        if "bias" in names:
            found["bias"] = gy.sum(1)
        return found

    def square_norms(self, layer: nn.Bilinear, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        """Return the norms by the cheapest of the three formulas."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if "bias" in names:
            total += squares_per_example(gy.sum(1))
        if "weight" in names:
            positions, size = gy.shape[1], layer.weight.numel()
            factors = [at_least_single(f) for f in (gy, *_inputs(layer, x))]
            if positions == 1:
                total += torch.stack([squares_per_example(f) for f in factors]).prod(0)
            elif positions * sum(f.shape[2] for f in factors) < size:
                for part in chunks(len(x), 3 * positions**2 * x.element_size(), room(x)):
                    b, left, right = (torch.bmm(f[part], f[part].mT) for f in factors)
                    total[part] += sum_per_example(b * left * right)
            else:
                for part in chunks(len(x), size * x.element_size(), room(x)):
                    total[part] += squares_per_example(self.gradients(layer, x[part], gy[part], {"weight"})["weight"])
        return total

    def inner_products(self, layer: nn.Bilinear, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <B_i, the layer applied to both inputs with the directions as parameters>."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if "weight" in directions:
            left, right = _inputs(layer, x)
            total += products_per_example(gy, F.bilinear(left.contiguous(), right.contiguous(), directions["weight"]))
        if "bias" in directions:
            total += products_per_example(gy, directions["bias"])
        return total


def _inputs(layer: nn.Bilinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two inputs that lie side by side."""
    return x[..., : layer.in1_features], x[..., layer.in1_features :]
