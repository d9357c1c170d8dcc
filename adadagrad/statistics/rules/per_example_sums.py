"""Sums over one example: squares and products of rows, added precisely enough for differences of large numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from adadagrad.statistics.rules.chunking import chunks, room

FEW_ELEMENTS = 1 << 14
"""Elements up to which norms are taken in float64 at once, which then costs less than a conversion afterwards."""

PRODUCT_BYTES = 1 << 20
"""Most bytes of elementwise products that exist at a time, to be added while they are in the cache."""

ROWS = 512
"""Most rows that are added in float32 before they go to a float64 sum: sums of 512 squares are off by up to 2e-6."""


STRETCH = 1024
"""Squares of a row that are added in float32 before they go to a float64 sum: each such sum is off by 1e-7."""


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
        for part in chunks(len(left), left[0].numel() * left.element_size(), room(left, PRODUCT_BYTES))
    ]
    return torch.cat(sums).double()


def squares_per_example(values: Tensor) -> Tensor:
    """Return the squared norm of every row.

    Args:
        values: (n, ...).

    Returns:
        float64 (n,); squares are added in the values' own precision (float32 at least), `STRETCH` at a time where rows
        are long: added at once, 2 million of them come out 1e-4 too small, and 20 million 1e-3.
    """
    if values.dim() < 2:
        return values.double().square()
    rows = values.flatten(1)
    wide = values.numel() <= FEW_ELEMENTS or values.dtype.itemsize < 4
    whole = 0 if wide or values.dtype == torch.float64 else rows.shape[1] - rows.shape[1] % STRETCH
    if whole <= STRETCH:
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64 if wide else None)
        squares: Tensor = norms.double().square_()
        return squares
    norms = torch.linalg.vector_norm(torch.unflatten(rows[:, :whole], 1, (-1, STRETCH)), dim=2).double()
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1).double()
    total: Tensor = torch.linalg.vecdot(norms, norms)
    return total.add_(rest.square_())


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
