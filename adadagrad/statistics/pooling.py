r"""Variances that each rank has measured around its own mean, pooled into one: scalars only, one message.

Where a part of a step is measured, rank k's part is a group of n_k examples with the group's own mean gradient, so that
no gradient has to travel. With w_i the weights of the group's examples, scaled to sum 1, and f_k = 1 - sum w_i^2

.. math:: V = \frac{\sum_k n_k f_k V_k}{\sum_k n_k f_k}, \qquad
          e^2 = \frac{\sum_k (n_k f_k)^2 e_k^2}{(\sum_k n_k f_k)^2}

and likewise Vp. For equal weights n_k f_k = n_k - 1: the pooled sample variance. Every V_k is unbiased, and so is V.
"""

from __future__ import annotations

import math
from dataclasses import replace

from adadagrad.core.comm import Ranks
from adadagrad.core.records import GradientStatistics
from adadagrad.statistics.standard_errors import grad_norm_sq_error


def pooled(own: GradientStatistics, freedom: float, ranks: Ranks) -> GradientStatistics:
    """Return the record of all ranks' groups together; a collective, of 48 bytes.

    Args:
        own: This rank's record, with V, Vp and their error from its own group, and s of the whole step.
        freedom: n_k f_k; 0 for a group of fewer than two examples, whose V is not read.
        ranks: The ranks.

    Returns:
        The same on all ranks; V is NaN where no group holds two examples.
    """
    counts = freedom > 0
    inner, error = own.inner_product_variance, own.variance_trace_error
    total, variance, along, squares, silent, units = ranks.sum(
        freedom,
        freedom * own.variance_trace if counts else 0.0,
        freedom * inner if counts and inner is not None else 0.0,
        (freedom * error) ** 2 if counts and error is not None else 0.0,
        float(counts and error is None),
        float(own.num_units or 0),
    )
    whole = None if inner is None else along / total if total else math.nan
    b, factor = own.num_examples, own.weight_sq_sum
    return replace(
        own,
        variance_trace=variance / total if total else math.nan,
        inner_product_variance=whole,
        num_units=int(units),
        variance_trace_error=None if silent or not total else math.sqrt(squares) / total,
        grad_norm_sq_error=None if whole is None else grad_norm_sq_error(whole, factor or 1 / b),
    )
