r"""The random sketches of one measured step: their signs, what each probe found, and how far probes differ.

Letters: layer l has per-example gradients g_i and, of the measured examples together, G = sum c_i g_i and C = sum c_i.
Probe r multiplies both by random signs w_r, the same for all examples. Because E[w w^T] = 1,

    E |g_i w_r|^2 = |g_i|^2    and    E |G w_r|^2 = |G|^2.

V is a difference of the two, so both are taken from the same probes: their errors cancel instead of adding, and what a
probe says of sum w_i |g_i - G/C|^2 is never negative. What probe r says of layer l is

    Z_lr = sum_i c_i |g_i w_r|^2 / C - |G w_r|^2 / C^2,

and its standard error over k probes, sqrt(sum_r (Z_lr - mean)^2 / (k (k - 1))), adds in squares over layers, whose
signs are independent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from adadagrad.core.comm import ALONE, Ranks
from adadagrad.core.vectors import squared_norm

Shape: TypeAlias = Callable[[], tuple[int, ...]]
"""Gives the shape of the signs of a layer, probes first."""


class OfGradient(Protocol):
    """Sketches a gradient that is already there, as the examples' gradients were sketched."""

    def __call__(self, gradient: Tensor, signs: Tensor) -> Tensor:
        """Return the sketches of all probes.

        Args:
            gradient: A tensor of the parameter's shape.
            signs: The signs, probes first.

        Returns:
            (k, ...).
        """


class Sketches:
    """The sketches of one measured step, over all its micro-batches.

    Args:
        probes: k, sketches of each layer.
        seed: Seeds the signs.
        number: The step's number among the measured ones; another step has other signs.
        ranks: The processes whose examples are added up.
    """

    def __init__(self, probes: int, seed: int, number: int, ranks: Ranks = ALONE) -> None:
        self.probes, self._seed, self._number, self._ranks = probes, seed, number, ranks
        self._signs: dict[str, Tensor] = {}
        self._layers: dict[str, tuple[nn.Parameter, OfGradient, Shape]] = {}
        self._pending: dict[str, Tensor] = {}  # of the micro-batch in progress
        self._sums: dict[str, Tensor] = {}
        self._group: dict[str, tuple[float, list[float]]] = {}

    def signs(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the random signs of a layer: a function of seed, step, layer and probe, and of nothing else.

        They come from a generator of their own, so that dropout draws what it would have drawn, a checkpoint that
        repeats the call sees them again, and all ranks agree.

        Args:
            name: Qualified name of the layer.
            shape: Their shape, probes first.
            like: Gives precision and device.

        Returns:
            -1 and 1.
        """
        signs = self._signs.get(name)
        if signs is None or (signs.shape, signs.dtype, signs.device) != (shape, like.dtype, like.device):
            key = hashlib.sha256(f"{self._seed}/{self._number}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
            drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
            signs = self._signs[name] = drawn.to(like.device).to(like.dtype) * 2 - 1
        return signs

    def expect(self, name: str, parameter: nn.Parameter, of_gradient: OfGradient, shape: Shape) -> None:
        """Take note of a layer that may be sketched, on this rank or on another one.

        Args:
            name: Qualified name of the layer.
            parameter: Its weight.
            of_gradient: Sketches the weight's whole gradient as `note` is told of every example's.
            shape: Gives the shape of its signs, probes first.
        """
        self._layers[name] = (parameter, of_gradient, shape)

    def note(self, name: str, squares: Tensor) -> None:
        """Take in what the probes found in one call of a layer.

        Args:
            name: Qualified name of the layer, an expected one.
            squares: |c_i g_i w_r|^2, float64 (n, k).
        """
        self._pending[name] = squares

    def take(self, weights: float | Tensor) -> None:
        """Add a micro-batch to the sums, now that the weights of its examples are known.

        Args:
            weights: c_i, one number or float64 (n,); rows of weight 0 are not examples.
        """
        for name, squares in self._pending.items():
            c = torch.as_tensor(weights, dtype=squares.dtype, device=squares.device)
            found = (squares * torch.where(c != 0, c.reciprocal(), 0.0).reshape(-1, 1)).sum(0)
            self._sums[name] = self._sums[name] + found if name in self._sums else found
        self._pending.clear()

    def close(self, gradients: Mapping[nn.Parameter, Tensor]) -> float:
        """Sketch the gradient of the measured examples together, wherever a rank has sketched those of its examples.

        Args:
            gradients: Parameter -> G; one that is missing has gradient 0.

        Returns:
            |G|^2 over all parameters.
        """
        rest, names = dict(gradients), sorted(self._layers)
        sketched = self._ranks.sum(*(float(name in self._sums) for name in names)) if names else ()
        for name in (name for name, ranks in zip(names, sketched, strict=True) if ranks):
            parameter, of_gradient, shape = self._layers[name]
            gradient = rest.pop(parameter, None)
            if gradient is None:
                self._group[name] = (0.0, [0.0] * self.probes)
                continue
            values = gradient.float() if gradient.element_size() < 4 else gradient
            rows = of_gradient(values, self.signs(name, shape(), values)).reshape(self.probes, -1)
            self._group[name] = (float(squared_norm([gradient])), rows.double().square().sum(1).tolist())
        return sum(norm for norm, _ in self._group.values()) + float(squared_norm(list(rest.values())))

    def correction(self) -> float:
        """Return what to add to |G|^2 so that it has the probes' error too: the sum of mean_r |G w_r|^2 - |G|^2."""
        return sum(math.fsum(found) / self.probes - norm for norm, found in self._group.values())

    def error(self, weight: float, group_weight: float) -> float | None:
        """Return the probes' standard error of sum w_i |g_i - G/C|^2; None for a single probe.

        Args:
            weight: C of the examples' sums, over all ranks.
            group_weight: C by which the gradient given to `close` is to be divided.

        Returns:
            [grad^2]; 0 where no layer was sketched.
        """
        values = self._over_ranks(list(self._group))
        if not values:
            return 0.0
        if self.probes < 2:
            return None
        variance = 0.0
        for name, sums in values.items():
            group = self._group[name][1]
            found = [s / weight - g / group_weight**2 for s, g in zip(sums, group, strict=True)]
            mean = math.fsum(found) / self.probes
            variance += math.fsum((z - mean) ** 2 for z in found) / (self.probes * (self.probes - 1))
        return math.sqrt(variance)

    def _over_ranks(self, names: Collection[str]) -> dict[str, list[float]]:
        """Return each layer's sums over the examples of all ranks, probe by probe."""
        if not names:
            return {}
        rows = [self._sums[name].tolist() if name in self._sums else [0.0] * self.probes for name in names]
        flat = iter(self._ranks.sum(*(value for row in rows for value in row)))
        return {name: [next(flat) for _ in range(self.probes)] for name in names}
