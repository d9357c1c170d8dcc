r"""How far s, and V from units, may be from what they estimate: the formulas that need no example's own gradient norm.

The error of V from examples is in `adadagrad.statistics.sums`, beside the sums that it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from adadagrad.core.comm import ALONE, Ranks


def grad_norm_sq_error(inner_product_variance: float, mean_variance_factor: float) -> float | None:
    r"""Return the standard error of s = |g|^2 as an estimate of its mean.

    .. math:: s = \Bigl|\sum_i c_i g_i\Bigr|^2, \qquad ds = 2 \langle g, dg \rangle, \qquad
              \mathrm{Var}\, s \approx 4\, g^T \mathrm{Cov}(g)\, g = 4 V_p \sum_i c_i^2

    The mean of s is |grad F|^2 + tr Sigma sum c_i^2: this is the error of s itself, not that of s as an estimate of
    |grad F|^2, which s exceeds on average.

    The delta method leaves out the second-order term 2 tr(Sigma^2) (sum c_i^2)^2 of Var s, which is all of it where the
    mean gradient is zero. But V_p is taken along the measured g instead of the mean gradient, and so exceeds what the
    formula asks for by tr(Sigma^2) sum c_i^2 on average (exactly for Gaussian units): four times that covers the term
    twice over. So the error is right where signal dominates, and up to sqrt(2) too large where noise does.

    Args:
        inner_product_variance: V_p [grad^4], of one example.
        mean_variance_factor: Sum of the squared weights c_i of all examples in g, measured or not.

    Returns:
        The error [grad^2]; None where V_p is not a finite number, as for fewer than two units.

    Source: this project (delta method; derived, and checked by simulation).

    Example:
        >>> grad_norm_sq_error(inner_product_variance=4.0, mean_variance_factor=1 / 16)
        1.0
    """
    variance = 4 * inner_product_variance * mean_variance_factor
    return math.sqrt(variance) if math.isfinite(variance) and variance >= 0 else None


def unit_contrasts(sizes: Sequence[int], unit_norms: Sequence[float], mean_norms: Sequence[float]) -> list[float]:
    r"""Return what each unit after the first adds to sum n_k |u_k - g|^2, as in a running variance.

    .. math:: z_k = \frac{n_k N_{k-1}}{N_k} |u_k - m_{k-1}|^2
                  = n_k |u_k|^2 + N_{k-1} |m_{k-1}|^2 - N_k |m_k|^2

    m_k is the mean gradient over the first k units and N_k the number of their examples.

    Args:
        sizes: n_k, examples of each unit.
        unit_norms: |u_k|^2 of each unit's mean gradient [grad^2].
        mean_norms: |m_k|^2 of the mean gradient up to each unit [grad^2].

    Returns:
        z_2, ..., z_K [grad^2]; together they are the numerator of V. Rounding may leave one slightly negative.

    Example:
        >>> unit_contrasts([2, 2, 2], [1.0, 9.0, 25.0], [1.0, 4.0, 9.0])  # u = 1, 3, 5
        [4.0, 12.0]
    """
    contrasts, examples = [], 0
    for k, n in enumerate(sizes):
        if k > 0:
            earlier = examples * mean_norms[k - 1]
            contrasts.append(n * unit_norms[k] + earlier - (examples + n) * mean_norms[k])
        examples += n
    return contrasts


def unit_variance_error(contrasts: Sequence[float], num_units: int, ranks: Ranks = ALONE) -> float | None:
    r"""Return the standard error of V = sum n_k |u_k - g|^2 / (K - 1) from the spread of its contrasts.

    .. math:: V = \frac{1}{K-1} \sum_{k=2}^{K} z_k, \qquad
              \mathrm{Var}\, V = \frac{\mathrm{Var}\, z}{K - 1}

    The K - 1 contrasts each have mean tr Sigma, and for units whose mean gradients are Gaussian (which averaging over
    n_k examples brings about) they are independent and alike, with variance 2 tr(Sigma^2), whatever the mean gradient
    and the n_k are. So V is a plain mean of K - 1 numbers, and their sample variance says how good it is; nothing needs
    to be known of the number of directions that the noise has.

    Args:
        contrasts: z_k of this rank [grad^2], from `unit_contrasts`; those between ranks are not known.
        num_units: K, over all ranks, of which each has one or more: one more than it has contrasts.
        ranks: The processes whose contrasts are added up.

    Returns:
        The error [grad^2]; None where there are fewer than two contrasts, which takes three units on one rank. From K
        units it is about as good as a variance from K - 1 numbers: very rough for K = 3 or 4.

    Source: this project (derived, and checked by simulation).

    Example:
        >>> unit_variance_error([4.0, 12.0], num_units=3)
        4.0
    """
    count = num_units - ranks.count
    if count < 2:
        return None
    (total,) = ranks.sum(sum(contrasts))
    mean = total / count
    (squares,) = ranks.sum(sum((z - mean) ** 2 for z in contrasts))
    return math.sqrt(squares / (count - 1) / (num_units - 1))
