r"""Whether rules have counted a gradient rightly, where no rank may keep its gradients: by products with random signs.

Under `fully_shard` a rank sees each parameter's own gradient G of a micro-batch for a moment, before it is cut up and
averaged. Then, with signs v of the parameter's shape, drawn anew for every step that verifies,

.. math:: \langle G, v \rangle = \sum_i \langle c_i g_i, v \rangle

must hold for the rules' g_i. Where it does not hold for the vectors themselves, the difference D has a product of size
\|D\|_F with most draws. One number is kept for each parameter. No message: every rank judges its own examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from adadagrad.core.vectors import inner_product, squared_norm
from adadagrad.statistics.calls import KeptCall
from adadagrad.statistics.coverage import negligible, tolerance


class Projections:
    """Takes in the gradients of one micro-batch, as a `Watch` hands them over.

    Args:
        names: Name of each parameter.
        number: The step's number among the measured ones; another step has other signs.
        verify: Whether products are formed; otherwise it is only noted which parameters received a gradient.
    """

    def __init__(self, names: Mapping[str, nn.Parameter], number: int, *, verify: bool) -> None:
        self._names = {p: name for name, p in names.items()}
        self._number, self._verify = number, verify
        self.received: set[nn.Parameter] = set()
        self._products: dict[nn.Parameter, float] = {}
        self._squares: dict[nn.Parameter, float] = {}
        self._types: set[torch.dtype] = set()

    def __call__(self, p: nn.Parameter, gradient: Tensor) -> None:
        """Take in one gradient, or a part of it: parts add up.

        Args:
            p: The model's parameter.
            gradient: This rank's gradient, of full shape.
        """
        self.received.add(p)
        if self._verify and p in self._names:
            signs = self._signs(p, gradient)
            self._products[p] = self._products.get(p, 0.0) + float(inner_product([gradient], [signs]))
            self._squares[p] = self._squares.get(p, 0.0) + float(squared_norm([gradient]))
            self._types.add(gradient.dtype)

    def miscounted(self, kept: Sequence[KeptCall], parameters: Collection[nn.Parameter]) -> set[nn.Parameter]:
        """Return the parameters whose per-example gradients do not add up to this rank's gradient.

        Args:
            kept: All calls of the micro-batch.
            parameters: Those to be judged.

        Returns:
            The parameters that fail by more than rounding; a gradient with NaN is not judged.
        """
        types = {*self._types, *(entry.gy.dtype for entry in kept)}
        spare = negligible(types) * sum(self._squares.values()) ** 0.5
        wrong = set()
        for p in set(parameters) & self._products.keys():
            total = size = 0.0
            for entry in kept:
                if p in set(entry.call.parameters.values()):
                    products = entry.inner_products({p: self._signs(p, entry.gy)})
                    assert products is not None
                    total += float(products.sum())
                    size += float(products.abs().sum())
            bar = spare + tolerance(types) * (size + self._squares[p] ** 0.5)
            if abs(total - self._products[p]) > bar:
                wrong.add(p)
        return wrong

    def _signs(self, p: nn.Parameter, like: Tensor) -> Tensor:
        """Return -1 and 1 in the shape of a parameter, made anew at each call; another generator than training's."""
        key = hashlib.sha256(f"{self._number}/{self._names[p]}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        drawn = torch.randint(0, 2, tuple(p.shape), generator=generator, dtype=torch.int8)
        return drawn.to(like.device).to(like.dtype) * 2 - 1
