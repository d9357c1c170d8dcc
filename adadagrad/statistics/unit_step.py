"""What one measured step of `MicroBatch` gathers, and the four numbers made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from adadagrad.core.comm import ALONE
from adadagrad.core.errors import InvalidMeasurement
from adadagrad.core.records import GradientStatistics
from adadagrad.core.vectors import inner_product, squared_norm
from adadagrad.statistics.base import Request
from adadagrad.statistics.coordinate import reduce_ratio
from adadagrad.statistics.measured_part import MeasuredPart
from adadagrad.statistics.standard_errors import grad_norm_sq_error, unit_contrasts, unit_variance_error


@dataclass(slots=True)
class _Unit:
    """One micro-batch: n_k, C_k = sum c_i, |C_k u_k|^2, and the gradients C_k u_k where they are needed.

    `norm_sq_so_far` is |sum_{l <= k} C_l u_l|^2, of the gradient added up to here, for the standard error of V.
    """

    num_examples: int
    weight: float
    norm_sq: Tensor
    norm_sq_so_far: Tensor
    gradients: dict[nn.Parameter, Tensor]


@dataclass(slots=True)
class UnitStep:
    """The units measured so far in one step.

    Args:
        units: The units.
        square_sums: sum n_k u_kj^2 of every parameter, float64.
        part: Their gradient where the step goes on without measuring.
    """

    units: list[_Unit] = field(default_factory=list)
    square_sums: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    part: MeasuredPart = field(default_factory=MeasuredPart)

    def add(
        self,
        gradients: dict[nn.Parameter, Tensor],
        so_far: dict[nn.Parameter, Tensor],
        n: int,
        weight: float,
        request: Request,
    ) -> None:
        """Take in one micro-batch.

        Args:
            gradients: C_k u_k, what its backward has added to `.grad`.
            so_far: What `.grad` holds after it.
            n: n_k, its examples.
            weight: C_k, their weights in sum.
            request: The numbers wanted.

        Raises:
            InvalidMeasurement: The weights do not add up to more than 0.
        """
        if not weight > 0 and request.gradient != "sharded":  # where another rank's part of the unit may weigh
            raise InvalidMeasurement(f"the weights of a measured micro-batch must add up to > 0, got {weight}")
        kept = {p: gradient.clone() for p, gradient in gradients.items()} if request.inner_products else {}
        norm_sq = squared_norm(list(gradients.values()))
        total = squared_norm(list(so_far.values())) if self.units else norm_sq
        self.units.append(_Unit(n, weight, norm_sq, total, kept))
        if request.coordinates is not None:
            for p, gradient in gradients.items():
                square = (gradient.double() / weight).square() * n
                self.square_sums[p] = self.square_sums.get(p, 0) + square

    def statistics(
        self,
        gradients: dict[nn.Parameter, Tensor],
        request: Request,
        num_examples: int | None,
        weight_sq_sum: float | None,
        scale: float,
    ) -> GradientStatistics:
        """Return the four numbers.

        Args:
            gradients: The step's final mean gradient.
            request: The numbers wanted.
            num_examples: b; None means the measured ones.
            weight_sq_sum: Sum of the squared weights; None means 1 / b.
            scale: Factor by which the gradients have been multiplied since the backward.

        Returns:
            The record.
        """
        s = float(squared_norm(list(gradients.values())))
        if request.gradient == "sharded":
            scale *= request.ranks.count
            request = self._over_all_ranks(request)
        units, part = self.units, self.part
        squares = sum(unit.num_examples * float(unit.norm_sq) / unit.weight**2 for unit in units)
        count, total, weight, squares = request.ranks.sum(
            len(units), sum(unit.num_examples for unit in units), sum(unit.weight for unit in units), squares
        )
        # The mean gradient over the measured units: .grad itself (scaled since), or the noted part of it.
        divisor = weight * (scale if part.norm_sq is None else 1.0)
        mean_sq = (s if part.norm_sq is None else part.norm_sq) / divisor**2
        freedom = count - 1
        ratio = None
        if request.coordinates is not None and freedom > 0:
            ratio = self._ratio(gradients, request, total, divisor, freedom)
        inner = self._inner(gradients, request, total, freedom) if request.inner_products else None
        b = num_examples if num_examples is not None else int(total)
        return GradientStatistics(
            num_examples=b,
            grad_norm_sq=s,
            variance_trace=max(squares - total * mean_sq, 0.0) / freedom if freedom > 0 else math.nan,
            inner_product_variance=inner,
            coordinate_ratio=ratio,
            num_units=int(count),
            kind="micro_batch",
            weight_sq_sum=weight_sq_sum,
            variance_trace_error=unit_variance_error(self._contrasts(), int(count), request.ranks),
            grad_norm_sq_error=None if inner is None else grad_norm_sq_error(inner, weight_sq_sum or 1 / b),
        )

    def _over_all_ranks(self, request: Request) -> Request:
        """Count in what all ranks have of each unit, whose reduced gradient is their mean; one message.

        Args:
            request: The request, whose ranks hold shards.

        Returns:
            The same for one process: all numbers are those of whole units now.

        Raises:
            InvalidMeasurement: A unit weighs nothing on any rank.
        """
        count = len(self.units)
        own = [float(unit.num_examples) for unit in self.units] + [unit.weight for unit in self.units]
        found = request.ranks.sum(*own)
        for unit, n, weight in zip(self.units, found[:count], found[count:], strict=True):
            if not weight > 0:
                raise InvalidMeasurement(f"the weights of a measured micro-batch must add up to > 0, got {weight}")
            unit.num_examples, unit.weight = int(n), weight / request.ranks.count
        return replace(request, ranks=ALONE, gradient="shared")

    def _contrasts(self) -> list[float]:
        """Return what each unit of this rank but the first adds to the numerator of V."""
        norms, means, weight = [], [], 0.0
        for unit in self.units:
            weight += unit.weight
            norms.append(float(unit.norm_sq) / unit.weight**2)
            means.append(float(unit.norm_sq_so_far) / weight**2)
        return unit_contrasts([unit.num_examples for unit in self.units], norms, means)

    def _inner(self, gradients: dict[nn.Parameter, Tensor], request: Request, total: float, freedom: float) -> float:
        """Return sum n_k (p_k - pbar)^2 / (K - 1) over all ranks with p_k = <u_k, g>; our extension, derived."""
        units, products = self.units, []
        for unit in units:
            shared = [p for p in unit.gradients if p in gradients]
            product = inner_product([unit.gradients[p] for p in shared], [gradients[p] for p in shared])
            products.append(float(product) / unit.weight)
        (weighted,) = request.ranks.sum(sum(unit.num_examples * p for unit, p in zip(units, products, strict=True)))
        deviations = [unit.num_examples * (p - weighted / total) ** 2 for unit, p in zip(units, products, strict=True)]
        (spread,) = request.ranks.sum(sum(deviations))
        return spread / freedom if freedom > 0 else math.nan

    def _ratio(
        self, gradients: dict[nn.Parameter, Tensor], request: Request, total: float, divisor: float, freedom: float
    ) -> float | None:
        """Return the coordinate ratio over all ranks; `total` examples, the mean is the sum over `divisor`."""
        assert request.coordinates is not None
        group = self.part.gradients or gradients
        order = [p for p in gradients if p in self.square_sums or p in group]
        means = [group[p].double() / divisor for p in order]
        q = [request.ranks.add_(self.square_sums.get(p, torch.zeros_like(p, dtype=torch.float64))) for p in order]
        spread = [((a - total * m.square()) / freedom).clamp_(min=0) for a, m in zip(q, means, strict=True)]
        moment = request.second_moment
        moments = None if moment is None else [moment(p) for p in order]
        return reduce_ratio(spread, [gradients[p] for p in order], request.coordinates, moments)
