r"""`RunningStatistics`: averages over steps of the numbers that may be averaged, and a record rebuilt from them.

The noise scale V / |grad F|^2 of one step is a ratio of two noisy numbers, of which the lower one is often negative.
Averages of both are far less noisy, and their ratio is nearly unbiased. So they are averaged apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from adadagrad.core.checks import check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics, quotient
from adadagrad.statistics.combination import AbstractCombination

_MEANS = ("weight", "signal", "variance", "along_weight", "along", "inverse_ratio_weight", "inverse_ratio")
_SQUARES = ("weight", "variance_weight", "variance", "norm_weight", "norm", "norm_cross", "norm_variance")


class RunningStatistics(AbstractCombination):
    r"""Average V and the unbiased |grad F|^2 apart, and rebuild s for the present batch size.

    .. math:: \bar x = \frac{\sum_k w_k x_k}{\sum_k w_k}, \quad w_k = \beta^{n-k}, \qquad
              \bar s = \overline{G^2} + \bar V \sum_i c_i^2, \quad G^2_k = s_k - V_k \sum_i c_{ki}^2

    In code: the record's `variance_trace` is the average of V, and its `true_grad_norm_sq` that of G^2, whatever batch
    sizes the steps had; c_i are the present step's weights (1 / b), and so `grad_norm_sq` is what the present batch
    size would give. Where the average of G^2 is so negative that s would be below 0, s is 0: a test then asks
    for an infinite batch. The other numbers:

    - Vp / s, the variance along the gradient, is averaged, and Vp is that average times the rebuilt s. Unlike Vp it
      does not scale with |g|^4, which shrinks while training, and as Vp <= V s in every step, Vo stays >= 0. It is
      a ratio of noisy numbers all the same, and taken along the gradient of each step.
    - 1 / ratio is averaged for `coordinate_ratio`, because the mean of V_j / g_j^2 itself is infinite where g_j may be
      near 0. Nothing in it is corrected for the batch size or for the bias of g_j^2.
    - A standard error is that of the weighted mean over independent steps, sqrt(sum w_k^2 e_k^2) / sum w_k. For s, e_k
      has the error of s_k, and that of V_k as far as the batch size has changed since. Steps without an error count as
      the mean of the others; where the present one has none, neither has the average. That training moves the true
      values meanwhile is not in it.

    `num_examples`, `num_units`, `kind` and `weight_sq_sum` stay the present step's. A step whose V or s is not
    finite is left out, as is a single Vp / s or ratio that is not; what was averaged before is then returned,
    and before there is anything, the step's own. Constant time and memory, plain numbers only.

    Args:
        decay: beta, in (0, 1): an average over about 1 / (1 - beta) measured steps, with errors
            sqrt((1 - beta) / (1 + beta)) of one step's. Smaller follows training faster and is noisier.

    Raises:
        InvalidArgument: `decay` is not between 0 and 1.

    Source: McCandlish, Kaplan, Amodei (2018), An empirical model of large-batch training, arXiv 1812.06162, appendix A;
        debiased averages of both, divided afterwards, verified in CerebrasResearch/nanoGNS (exact/ddpgns.py).
    Differs from the paper: V and G^2 come from one batch instead of two batch sizes; Vp, the coordinate
        ratio and the errors are this project's.

    Example:
        >>> running = RunningStatistics(decay=0.5)
        >>> for s in (4.0, 1.0):
        ...     averaged = running.update(GradientStatistics(num_examples=4, grad_norm_sq=s, variance_trace=8.0), ())
        >>> averaged.true_grad_norm_sq  # (1/2 * 2 + 1 * -1) / (3/2)
        0.0
    """

    def __init__(self, decay: float) -> None:
        check_decay(decay)
        self.decay = decay
        self._means = dict.fromkeys(_MEANS, 0.0)
        self._squares = dict.fromkeys(_SQUARES, 0.0)

    def update(self, statistics: GradientStatistics, parameters: Iterable[nn.Parameter]) -> GradientStatistics:
        """Take in a measured step and return the average as if it were the step's; `parameters` are not read.

        Args:
            statistics: What was measured in it.
            parameters: Any.

        Returns:
            The averaged record.
        """
        left_out = not math.isfinite(statistics.true_grad_norm_sq)
        if not left_out:
            self._means = _added(self._means, self.decay, _mean_terms(statistics))
            self._squares = _added(self._squares, self.decay**2, _square_terms(statistics))
        if self._means["weight"] == 0:
            return statistics
        return self._rebuilt(statistics, left_out)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, as plain numbers; see `AbstractCombination`."""
        return {"means": dict(self._means), "squares": dict(self._squares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; see `AbstractCombination`."""
        self._means = {name: float(state["means"][name]) for name in _MEANS}
        self._squares = {name: float(state["squares"][name]) for name in _SQUARES}

    def _rebuilt(self, statistics: GradientStatistics, left_out: bool) -> GradientStatistics:
        """Return the present step's record with the averages in it."""
        m, c = self._means, statistics.mean_variance_factor
        variance = m["variance"] / m["weight"]
        norm_sq = max(m["signal"] / m["weight"] + variance * c, 0.0)
        along, ratio = statistics.inner_product_variance, statistics.coordinate_ratio
        if along is not None and m["along_weight"]:
            along = m["along"] / m["along_weight"] * norm_sq
        if ratio is not None and m["inverse_ratio_weight"]:
            ratio = quotient(m["inverse_ratio_weight"], m["inverse_ratio"])
        has_variance = left_out or statistics.variance_trace_error is not None
        has_norm = left_out or (has_variance and statistics.grad_norm_sq_error is not None)
        norm = self._squares["norm"] - 2 * c * self._squares["norm_cross"] + c**2 * self._squares["norm_variance"]
        return replace(
            statistics,
            grad_norm_sq=norm_sq,
            variance_trace=variance,
            inner_product_variance=along,
            coordinate_ratio=ratio,
            variance_trace_error=self._error(self._squares["variance"], "variance_weight") if has_variance else None,
            grad_norm_sq_error=self._error(norm, "norm_weight") if has_norm else None,
        )

    def _error(self, squares: float, weight: str) -> float | None:
        """Return the error of a weighted mean from sum w^2 e^2 over the steps that have one; None where none has."""
        known, of_all = self._squares[weight], self._squares["weight"]
        return math.sqrt(max(squares, 0.0) / known * of_all) / self._means["weight"] if known else None


def check_decay(decay: float) -> None:
    """Refuse a decay with which nothing or everything would be forgotten.

    Args:
        decay: beta.

    Raises:
        InvalidArgument: It is not between 0 and 1.
    """
    check_positive(decay=decay)
    if decay >= 1:
        raise InvalidArgument(f"decay must be < 1, got {decay}: 0.95 averages over about 20 measured steps")


def _added(sums: Mapping[str, float], decay: float, terms: Mapping[str, float]) -> dict[str, float]:
    return {name: decay * value + terms.get(name, 0.0) for name, value in sums.items()}


def _mean_terms(statistics: GradientStatistics) -> dict[str, float]:
    """Return what a step adds to the sums of the averages: numbers, and 1 for each that is there."""
    terms = {"weight": 1.0, "signal": statistics.true_grad_norm_sq, "variance": statistics.variance_trace}
    vp, ratio = statistics.inner_product_variance, statistics.coordinate_ratio
    along = math.nan if vp is None else quotient(vp, statistics.grad_norm_sq)
    inverse = math.nan if ratio is None else quotient(1.0, ratio)
    for name, value in (("along", along), ("inverse_ratio", inverse)):
        if math.isfinite(value):
            terms |= {f"{name}_weight": 1.0, name: value}
    return terms


def _square_terms(statistics: GradientStatistics) -> dict[str, float]:
    """Return what a step adds to the sums of squared errors.

    The rebuilt s is the mean of s_k + (c - c_k) V_k, whose squared error is e_s^2 + (c - c_k)^2 e_V^2: three sums,
    because c is not known yet.
    """
    terms, c = {"weight": 1.0}, statistics.mean_variance_factor
    if statistics.variance_trace_error is not None:
        noise = statistics.variance_trace_error**2
        terms |= {"variance_weight": 1.0, "variance": noise}
        if statistics.grad_norm_sq_error is not None:
            norm = statistics.grad_norm_sq_error**2 + c**2 * noise
            terms |= {"norm_weight": 1.0, "norm": norm, "norm_cross": c * noise, "norm_variance": noise}
    return terms
