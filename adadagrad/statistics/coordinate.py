r"""The reduced coordinate ratio of the coordinate-wise norm test, where the tensors live.

.. math:: r = \operatorname{reduce}_j \; V_j / g_j^2

with V_j the variance of coordinate j of one example's gradient and g_j that coordinate of the mean gradient.

What zero means: a coordinate with V_j = 0 and g_j = 0 (a frozen or unused parameter, a dead unit) says
nothing and is left out; V_j > 0 with g_j = 0 makes the ratio infinite. Zero is meant up to rounding: the bias of
an attention key, or one in front of a normalisation, has gradients that are nothing but rounding, and their ratio
is too. If every coordinate is left out the ratio is 0: no noise was seen anywhere. A NaN anywhere makes the
ratio NaN. Over ranks, sum_i g_ij^2 is added as one vector of the parameters'
size before V_j is formed, so every rank reduces the same numbers to the same ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import quotient
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.core.vectors import PIECE
from adadagrad.statistics.sums import WeightedSums

ROUNDINGS = 64
"""A gradient smaller than so many units in the last place of the largest one counts as zero."""

Piece: TypeAlias = tuple[Tensor, Tensor]


def reduce_ratio(
    variances: Sequence[Tensor],
    means: Sequence[Tensor],
    reduction: CoordinateReduction,
    second_moments: Sequence[Tensor | None] | None = None,
) -> float | None:
    r"""Reduce V_j / g_j^2 over all coordinates of all tensors to one dimensionless number.

    ``"max"`` is the paper's literal maximum; it is dominated by whichever |g_j| is nearly zero (8 orders of
    magnitude above the norm test on a small network). Our extensions: ``"quantile"`` takes the smallest ratio
    that at least that share of the counted coordinates does not exceed; ``"blocks"`` the largest
    sum V_j / sum g_j^2 over parameter tensors; ``"weighted"`` sum w_j V_j / sum w_j g_j^2 with
    w_j = 1/sqrt(v_j), the norm test in the metric of the preconditioned step.

    Args:
        variances: V_j, one tensor per parameter [grad^2].
        means: g_j, the same shapes [grad].
        reduction: Which of the four.
        second_moments: v_j for ``"weighted"``, the same shapes [grad^2]; None where there is none yet.

    Returns:
        The ratio; infinite where a counted g_j (or weighted sum) is 0; None for ``"weighted"`` while any
        second moment is missing.

    Raises:
        InvalidArgument: ``"weighted"`` without second moments.

    Source: the maximum follows from the coordinate-wise expected strong growth condition of Lau, Liu, Kolar,
    arXiv 2402.11215 (from memory, unverified (high)). Differs from the paper: three labelled reductions.

    Example:
        >>> V, g = [torch.tensor([4.0, 9.0, 0.0])], [torch.tensor([1.0, 1.0, 0.0])]
        >>> reduce_ratio(V, g, CoordinateReduction(kind="max"))
        9.0
        >>> reduce_ratio(V, g, CoordinateReduction(kind="blocks"))
        6.5
    """
    if reduction.kind == "weighted":
        return _weighted_ratio(variances, means, second_moments)
    pairs = [(v.flatten(), g.flatten()) for v, g in zip(variances, means, strict=True) if v.numel()]
    if not pairs:
        return 0.0
    precision = min(torch.finfo(torch.float32).eps, max(torch.finfo(g.dtype).eps for _, g in pairs))
    pieces: Iterable[Piece] = _Pieces(pairs)
    if reduction.kind == "blocks":
        sums = [(v.double().sum(), g.double().square().sum()) for v, g in pairs]
        pieces = [(torch.stack([v for v, _ in sums]), torch.stack([s for _, s in sums]))]
    largest = _largest(pieces)
    if math.isnan(largest):
        return math.nan
    least = (ROUNDINGS * precision) ** 2 * largest
    if reduction.kind in {"max", "blocks"}:
        found = [(v / s).masked_fill_(v + s <= least, -math.inf).amax() for v, s in pieces]
        greatest = float(torch.stack(found).amax())
        return 0.0 if greatest == -math.inf else greatest
    counted = torch.cat([(v / s)[v + s > least] for v, s in pieces])
    if counted.numel() == 0:
        return 0.0
    assert reduction.quantile is not None
    rank = max(1, math.ceil(reduction.quantile * counted.numel() - 1e-9))
    return float(counted.kthvalue(rank).values)


class _Pieces:
    """V_j and g_j^2 in float64, so many coordinates at a time that they stay in a cache; may be gone through again."""

    def __init__(self, pairs: Sequence[Piece]) -> None:
        self._pairs = pairs

    def __iter__(self) -> Iterator[Piece]:
        for v, g in self._pairs:
            for some, others in zip(torch.split(v, PIECE), torch.split(g, PIECE), strict=True):
                yield some.double(), others.double().square()


def coordinate_variances(square_sums: Sequence[Tensor], group: Sequence[Tensor], sums: WeightedSums) -> list[Tensor]:
    """Return V_j = (sum w_i g_ij^2 - (G_j / C)^2) / (1 - sum w_i^2), after adding the sums over ranks.

    Args:
        square_sums: sum c_i g_ij^2 of this rank's measured examples, float64, one tensor per parameter; added
            over all ranks in place.
        group: G_j = sum c_i g_ij over the measured examples of all ranks, the same shapes.
        sums: C, the weights and the number of units, over all ranks.

    Returns:
        V_j, float64, clamped at 0 where rounding made it negative; NaN for fewer than two units.
    """
    if sums.freedom <= 0:
        return [torch.full_like(q, math.nan) for q in square_sums]
    variances = []
    for q, total in zip(square_sums, group, strict=True):
        variance = sums.ranks.add_(q) / sums.weight
        mean = total.double() / sums.weight
        variances.append(variance.addcmul_(mean, mean, value=-1).div_(sums.freedom).clamp_(min=0))
    return variances


def _largest(pieces: Iterable[Piece]) -> float:
    """Return the largest finite V_j + g_j^2, at least 0 where some are infinite; NaN if any is."""
    found = float(torch.stack([(v + s).amax() for v, s in pieces]).amax())
    if not math.isinf(found):
        return found
    sizes = (v + s for v, s in pieces)
    return float(torch.stack([size.masked_fill(size.isinf(), 0).amax() for size in sizes]).amax())


def _weighted_ratio(
    variances: Sequence[Tensor], means: Sequence[Tensor], second_moments: Sequence[Tensor | None] | None
) -> float | None:
    """Return sum w_j V_j / sum w_j g_j^2; coordinates without a second moment have no preconditioned step."""
    if second_moments is None:
        raise InvalidArgument('reduction="weighted" needs an optimizer with second moments: Adagrad, Adam or AdamW')
    noise = signal = 0.0
    for variance, mean, moment in zip(variances, means, second_moments, strict=True):
        if moment is None:
            return None
        weight = torch.where(moment > 0, moment.double(), math.inf).rsqrt()
        noise += float((weight * variance.double()).sum())
        signal += float((weight * mean.double().square()).sum())
    return 0.0 if noise == signal == 0 else quotient(noise, signal)
