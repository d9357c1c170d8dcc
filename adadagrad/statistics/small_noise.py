r"""Noise far below the mean gradient: V as a difference of nearly equal numbers, and how it is had all the same.

V is the mean of |g_i|^2 less |g|^2. In float32 the gradient that training has summed is off by 1e-7 to 1e-4 of its
norm (more for larger batches, most where all examples agree), so where V is below a thousandth of s = |g|^2 little or
nothing is left of it. Then the calls of the micro-batch, which are kept for it, are evaluated again in float64, a few
examples at a time: the norms |g_i|^2, their gradients' sum, which takes the place of the trained one in V, and the
products <g_i, g> where they are wanted. What remains is the rounding of the layers' inputs and output gradients
themselves, about 1e-7 of |g_i| and independent between examples: V is right to about (1e-7 |g|)^2 / V, which is 1e-6 at
a noise of 1e-4 of the mean.

s on record stays the norm of the trained gradient. A batch size test asks for less than one example long before this
matters; it is for whoever reads V. Cost: a float64 forward and weight gradient of the measured examples, at the steps
where the noise was this small the last time (and at those that verify). Not over several ranks. Three things keep the
rounding of float32: the gradients of layers done over example by example and those of reruns, which are only summed in
float64; the squares of single coordinates; and V at the one step at which noise first becomes this small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from adadagrad.core.vectors import squared_norm
from adadagrad.statistics.examples import Examples

SMALL = 1e-3
"""Share of s below which V is formed in float64."""


def is_small(variance_trace: float, grad_norm_sq: float) -> bool:
    """Return whether V is so small beside s that rounding shows in it; False where V is NaN."""
    return variance_trace < SMALL * grad_norm_sq


def is_coarse(gradients: Iterable[Tensor]) -> bool:
    """Return whether float64 would say more than these gradients do: not where they have it."""
    return any(g.dtype != torch.float64 for g in gradients)


def needs_double(weights: float | Tensor, squares: Tensor, gradients: Iterable[Tensor], before: bool = False) -> bool:
    """Return whether the noise of one micro-batch is so small beside its mean that rounding shows in V.

    Args:
        weights: c_i, one number or float64 (n,).
        squares: |c_i g_i|^2, float64 (n,).
        gradients: sum c_i g_i of this micro-batch, by parameter.
        before: Whether it was at the last step: a single example cannot tell, and goes by that.

    Returns:
        The answer; False for float64 gradients.
    """
    found = list(gradients)
    if not is_coarse(found):
        return False
    if isinstance(weights, float):
        weights = torch.full_like(squares, weights)
    rows = weights != 0
    if int(rows.sum()) < 2:
        return before
    total = float(weights.sum())
    mean_square = float((squares[rows] / weights[rows]).sum()) / total
    norm_sq = float(squared_norm(found)) / total**2
    return is_small(mean_square - norm_sq, norm_sq)


def in_double(examples: Examples, totals: dict[nn.Parameter, Tensor]) -> Tensor:
    r"""Return \|c_i g_i\|^2 of a micro-batch of which all calls are kept, evaluated in float64.

    Args:
        examples: The examples.
        totals: sum c_i g_i of every parameter, float64; this micro-batch's is added to it.

    Returns:
        float64 (n,).
    """
    squares = torch.zeros(examples.n, dtype=torch.float64, device=examples.device)
    for part, few in examples.pieces_in_double():
        squares[part] = few.square_norms()
        _add(totals, _summed(few))
    for part, gradients in examples.rerun():
        for p, gradient in gradients.items():
            wide = gradient.double()
            squares[part] += wide.flatten(1).square().sum(1)
            _add(totals, {p: wide.sum(0)})
    return squares


def products_in_double(examples: Examples, directions: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Return <c_i g_i, direction> of a micro-batch of which all calls are kept, evaluated in float64.

    Args:
        examples: The examples.
        directions: Parameter -> tensor of its shape; a parameter that is missing has direction 0.

    Returns:
        float64 (n,).
    """
    products = torch.zeros(examples.n, dtype=torch.float64, device=examples.device)
    for part, few in examples.pieces_in_double():
        products[part] = few.inner_products(directions)
    for part, gradients in examples.rerun():
        for p, gradient in gradients.items():
            if p in directions:
                products[part] += gradient.double().flatten(1) @ directions[p].double().flatten()
    return products


def _summed(examples: Examples) -> dict[nn.Parameter, Tensor]:
    """Return sum c_i g_i: what <sum c_i g_i, v>, which is linear in v, has for its derivative."""
    directions = {p: torch.zeros_like(p, dtype=torch.float64, requires_grad=True) for p in examples.parameters}
    if not directions:
        return {}
    with torch.enable_grad():
        product = examples.inner_products(directions).sum()
    found = torch.autograd.grad(product, list(directions.values()), materialize_grads=True)
    return dict(zip(directions, found, strict=True))


def _add(totals: dict[nn.Parameter, Tensor], more: Mapping[nn.Parameter, Tensor]) -> None:
    for p, value in more.items():
        totals[p] = totals[p] + value if p in totals else value
