"""What a rule is: how one call of one layer gives its share of every example's gradient."""

from __future__ import annotations

import abc
from collections.abc import Collection, Iterator, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

CHUNK_BYTES = 1 << 22
"""Most bytes of per-example gradients that exist at a time; a few megabytes stay in the cache of a CPU."""

FEW_ELEMENTS = 1 << 14
"""Elements up to which norms are taken in float64 at once, which then costs less than a conversion afterwards."""

PRODUCT_BYTES = 1 << 20
"""Most bytes of elementwise products that exist at a time, to be added while they are in the cache."""

ROWS = 512
"""Most rows that are added in float32 before they go to a float64 sum: sums of 512 squares are off by up to 4e-7."""

Layer = TypeVar("Layer", bound=nn.Module)


class AbstractRule(abc.ABC, Generic[Layer]):
    """Exact per-example statistics of a layer family, from a call's input and output gradient.

    Letters: n examples, x the layer's input (n, ...), gy the gradient of the loss with respect to the layer's
    output (n, ...), both with the examples first. `names` are the layer's own parameters that are wanted.
    The loss may weight example i by c_i; then everything here is of c_i g_i.
    """

    @abc.abstractmethod
    def accepts(self, layer: Layer, x: Tensor, dims: tuple[int, int]) -> bool:
        """Return whether a call with its examples in these dimensions of input and output can be counted.

        Args:
            layer: The module that was called.
            x: Its input as it came, examples in ``dims[0]``.
            dims: Batch dimensions of input and output.

        Returns:
            False where a layer works along the dimension of the examples; the fallback then counts it.
        """

    @abc.abstractmethod
    def gradients(self, layer: Layer, x: Tensor, gy: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return every example's gradient of each wanted parameter, materialised.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            names: Wanted parameter names.

        Returns:
            name -> (n, *parameter shape).
        """

    @abc.abstractmethod
    def square_norms(self, layer: Layer, x: Tensor, gy: Tensor, names: Collection[str]) -> Tensor:
        r"""Return \|g_i\|^2 summed over the wanted parameters.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            names: Wanted parameter names.

        Returns:
            float64 (n,) [grad^2].
        """

    @abc.abstractmethod
    def inner_products(self, layer: Layer, x: Tensor, gy: Tensor, directions: Mapping[str, Tensor]) -> Tensor:
        """Return <g_i, direction>, without forming any g_i.

        A layer that is linear in its parameters has <g_i, v> = <gy_i, the layer applied to x_i with v as its
        parameters>.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            directions: name -> tensor of the parameter's shape; only these parameters count.

        Returns:
            float64 (n,).
        """

    def square_sums(
        self, layer: Layer, x: Tensor, gy: Tensor, parameters: Mapping[str, Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        """Return sum_i w_i g_ij^2 of the wanted parameters, coordinate by coordinate.

        By default every example's gradient is formed, a few megabytes at a time: one more weight gradient.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            parameters: name -> parameter, for the wanted ones.
            weights: w_i >= 0, float64 (n,).

        Returns:
            name -> float64 tensor of the parameter's shape [grad^2]. In float32 each is within 4e-7 of itself, beside
            the rounding of the g_ij.
        """
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        for part in chunks(len(x), self.bytes_per_example(layer, x, gy, parameters)):
            for name, gradient in self.gradients(layer, x[part], gy[part], parameters.keys()).items():
                sums[name] += weighted_squares(gradient, weights[part])
        return sums

    def bytes_per_example(self, layer: Layer, x: Tensor, gy: Tensor, parameters: Mapping[str, Tensor]) -> int:
        """Return the bytes that `gradients` takes for one example.

        Args:
            layer: The module that was called.
            x: Its input (n, ...).
            gy: Its output's gradient (n, ...).
            parameters: name -> parameter, for the wanted ones.
        """
        return sum(p.numel() for p in parameters.values()) * gy.element_size()


def sum_per_example(product: Tensor) -> Tensor:
    """Sum everything but the first dimension, accumulated in float64.

    Args:
        product: (n, ...).

    Returns:
        float64 (n,).
    """
    return product.reshape(len(product), -1).sum(1, dtype=torch.float64)


def at_least_single(values: Tensor) -> Tensor:
    """Return half-precision values as float32, others as they are: products of gradients underflow in float16."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def dot_per_example(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of every row of `left` with that of `right`, multiplied in float32 at least.

    Args:
        left: (n, ...).
        right: A shape that broadcasts with it.

    Returns:
        float64 (n,).
    """
    return sum_per_example(at_least_single(left) * at_least_single(right))


def products_per_example(left: Tensor, right: Tensor) -> Tensor:
    """Return the same for less, where the rounding of float32 sums does no harm: for inner products, not for norms.

    Args:
        left: (n, ...).
        right: A shape that broadcasts with it.

    Returns:
        float64 (n,); in float32 within 1e-6 of the product of the rows' norms.
    """
    left, right = at_least_single(left), at_least_single(right).expand_as(left)
    if left.numel() == 0:
        return torch.zeros(len(left), dtype=torch.float64, device=left.device)
    sums = [
        (left[part] * right[part]).reshape(part.stop - part.start, -1).sum(1)
        for part in chunks(len(left), left[0].numel() * left.element_size(), PRODUCT_BYTES)
    ]
    return torch.cat(sums).double()


def squares_per_example(values: Tensor) -> Tensor:
    """Return the squared norm of every row.

    Args:
        values: (n, ...).

    Returns:
        float64 (n,); each row's norm is taken in the values' own precision (float32 at least), then squared.
    """
    if values.dim() < 2:
        return values.double().square()
    wide = values.numel() <= FEW_ELEMENTS or values.dtype.itemsize < 4
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=torch.float64 if wide else None)
    return norms.double().square_()


def weighted_squares(gradients: Tensor, weights: Tensor) -> Tensor:
    """Return sum_i w_i g_ij^2 over the first dimension.

    Args:
        gradients: g_i (n, ...).
        weights: w_i, float64 (n,).

    Returns:
        float64 of one row's shape; squared and added in float32 at least, `ROWS` rows at a time.
    """
    rows = at_least_single(gradients).reshape(len(gradients), -1)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for some, factors in zip(torch.split(rows, ROWS), torch.split(weights.to(rows.dtype), ROWS), strict=True):
        total += torch.mv(some.square().mT, factors)
    return total.view(gradients.shape[1:])


def chunks(n: int, bytes_per_example: int, most: int | None = None) -> Iterator[slice]:
    """Cut n examples into slices whose materialised gradients fit into `CHUNK_BYTES`.

    Args:
        n: Number of examples.
        bytes_per_example: Bytes of one example's materialised gradient.
        most: Another number of bytes to fit into.

    Yields:
        Slices that cover range(n) in order, at least one example each.
    """
    length = max(1, (CHUNK_BYTES if most is None else most) // max(1, bytes_per_example))
    for start in range(0, n, length):
        yield slice(start, min(n, start + length))


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable weight and bias of the module itself; rules know no other names (``weight_g``, say)."""
    own = layer._parameters
    found = ((name, own.get(name)) for name in ("weight", "bias"))
    return {name: p for name, p in found if p is not None and p.requires_grad}
