r"""The definition: statistics of gradients that are at hand as rows, slow and obvious.

.. math:: s = \|g\|^2, \quad V = \frac{1}{n-1} \sum_i \|g_i - g\|^2, \quad
          V_p = \frac{1}{n-1} \sum_i (\langle g_i, g\rangle - s)^2

Every estimator is tested against this file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.statistics.coordinate import reduce_ratio


def statistics_from_units(
    units: Tensor, unit_size: int = 1, *, coordinates: CoordinateReduction | None = None
) -> GradientStatistics:
    r"""Return the statistics of per-unit gradients given as rows: the definition of the four numbers.

    In code: g is the mean of the rows, s = |g|^2, and a unit that averages m examples has m-th of their
    variance, so V = m sum |u_k - g|^2 / (n - 1), and likewise Vp.

    Args:
        units: (n, d), row k the mean gradient of unit k [grad].
        unit_size: m, examples averaged in each unit.
        coordinates: Also reduce V_j / g_j^2 over the d coordinates this way (``"blocks"`` sees one block).

    Returns:
        GradientStatistics with num_examples = n m; V and Vp are NaN for a single unit.

    Raises:
        InvalidArgument: `units` is not a matrix with at least one row.

    Source: Byrd, Chin, Nocedal, Wu (2012), Sample size selection in optimization methods for machine
    learning; Bollapragada, Byrd, Nocedal (2018), Adaptive sampling strategies for stochastic optimization,
    arXiv 1710.11258; formulas verified in the public code of arXiv 2402.11215. Differs from the paper: no.

    Example:
        >>> stats = statistics_from_units(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]]))
        >>> stats.grad_norm_sq, stats.variance_trace, stats.inner_product_variance
        (5.0, 4.0, 7.0)
    """
    if not isinstance(units, Tensor):
        raise InvalidArgument(f"units must be a tensor (n, d), got {type(units).__name__}: torch.stack(...) the rows")
    if units.dim() != 2 or units.shape[0] == 0:
        raise InvalidArgument(f"units must be a matrix (n, d) with n >= 1, got shape {tuple(units.shape)}")
    check_integer(1, unit_size=unit_size)
    rows = units.detach().double()
    n = rows.shape[0]
    mean = rows.mean(0)
    s = float(mean.square().sum())
    deviations = rows - mean
    variances = unit_size * deviations.square().sum(0) / (n - 1) if n > 1 else torch.full_like(mean, math.nan)
    products = rows @ mean
    spread = unit_size * (products - s).square().sum() / (n - 1) if n > 1 else torch.tensor(math.nan)
    return GradientStatistics(
        num_examples=n * unit_size,
        grad_norm_sq=s,
        variance_trace=float(variances.sum()),
        inner_product_variance=float(spread),
        coordinate_ratio=None if coordinates is None else reduce_ratio([variances], [mean], coordinates),
        num_units=n,
        kind="per_example" if unit_size == 1 else "micro_batch",
    )
