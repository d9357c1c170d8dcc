"""What one measured step of `PerExample` gathers, and the four numbers made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adadagrad.core.comm import ALONE
from adadagrad.core.errors import InvalidArgument, InvalidMeasurement
from adadagrad.core.records import GradientStatistics
from adadagrad.core.vectors import squared_norm
from adadagrad.statistics.base import Coefficients, Request
from adadagrad.statistics.coordinate import coordinate_variances, reduce_ratio
from adadagrad.statistics.coverage import tolerance
from adadagrad.statistics.examples import Examples
from adadagrad.statistics.measured_part import MeasuredPart
from adadagrad.statistics.pooling import pooled
from adadagrad.statistics.sketches import Sketches
from adadagrad.statistics.small_noise import in_double, needs_double, products_in_double
from adadagrad.statistics.standard_errors import grad_norm_sq_error
from adadagrad.statistics.sums import WeightedSums


@dataclass(slots=True)
class ExampleStep:
    """Sums over the examples measured so far in one step.

    Args:
        sums: The scalars.
        kept: Examples with their c_i and the |g_i|^2 of those that count, for inner products.
        square_sums: sum c_i g_ij^2 of every parameter, float64.
        part: Their gradient where the step goes on without measuring.
        totals: sum c_i g_i of every parameter, float64, where noise is too small for the trained gradient; see
            `small_noise.py`.
        sketches: Those of `Probe`; None where every norm is exact.
    """

    sums: WeightedSums = field(default_factory=WeightedSums)
    kept: list[tuple[Examples, Tensor, Tensor]] = field(default_factory=list)
    square_sums: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    part: MeasuredPart = field(default_factory=MeasuredPart)
    totals: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    sketches: Sketches | None = None

    def add(
        self,
        examples: Examples,
        value: float | Tensor,
        request: Request,
        gradients: Mapping[nn.Parameter, Tensor] | None,
        small_noise: bool = False,
    ) -> None:
        """Take in one micro-batch.

        Args:
            examples: Its examples.
            value: c_i, one number or float64 (n,); zero-weight rows are not examples.
            request: The numbers wanted.
            gradients: What `.grad` holds where this is the step's first micro-batch and all its calls are kept.
            small_noise: Whether noise was too small for the trained gradient at the last step.
        """
        squares = examples.square_norms()
        if self.sketches is not None:
            self.sketches.take(value)
        small = (
            gradients is not None
            and request.ranks.count == 1
            and needs_double(value, squares, gradients.values(), small_noise)
        )
        if self.totals or small:
            squares = in_double(examples, self.totals)
        if isinstance(value, float):
            self.sums.add_equal(value, squares)
            if request.coordinates is None and not request.inner_products:
                return
            value = torch.full_like(squares, value)
        else:
            self.sums.add_squares(value, squares)
        weights, rows = value, value != 0
        if request.coordinates is not None:
            for p, sums in examples.weighted_square_sums(torch.where(rows, weights, torch.inf).reciprocal()):
                self.square_sums[p] = self.square_sums.get(p, 0) + sums
        if request.inner_products:
            self.kept.append((examples, weights, squares[rows] / weights[rows].square()))

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

        Raises:
            InvalidMeasurement: No example had a positive weight.
        """
        part, sketches = self.part.norm_sq is not None, self.sketches
        s = float(squared_norm(list(gradients.values()))) if part or sketches is None else sketches.close(gradients)
        if request.inner_products:
            for examples, weights, squares in self.kept:
                rows = weights != 0
                form = products_in_double if self.totals else Examples.inner_products
                products = form(examples, gradients)
                self.sums.products.append((weights[rows], products[rows] / weights[rows]))
                self.sums.unit_squares.append(squares)
        groups = part and request.ranks.count > 1 and request.gradient != "sharded"
        self.sums.ranks = ALONE if groups else request.ranks
        sums = (self.sums if part else self.sums.scaled(scale)).over_ranks(s if request.inner_products else None)
        if sums.units == 0 and not groups:
            raise InvalidMeasurement("every example had weight 0: give the rows that count a positive weight")
        if request.inner_products and not part:
            self._check_products(sums, s, gradients)
        norm_sq, probe_error = s if self.part.norm_sq is None else self.part.norm_sq, None
        if self.totals:
            norm_sq = float(squared_norm(list(self.totals.values()))) * (1.0 if part else scale**2)
        if sketches is not None:
            norm_sq += sketches.correction()
            probe_error = sketches.error(sums.weight / (1.0 if part else scale), sums.weight)
        ratio = None
        if request.coordinates is not None:
            ratio = self._ratio(gradients, request, sums, 1.0 if part else scale)
        b = num_examples if num_examples is not None else sums.units
        if num_examples is None:
            weight_sq_sum = sums.weight_sq / sums.weight**2
        inner = sums.inner_product_variance() if request.inner_products else None
        found = GradientStatistics(
            num_examples=b,
            grad_norm_sq=s,
            variance_trace=sums.variance_trace(norm_sq),
            inner_product_variance=inner,
            coordinate_ratio=ratio,
            num_units=sums.units,
            kind="per_example" if sketches is None else "probe",
            weight_sq_sum=weight_sq_sum,
            variance_trace_error=self._error(sums, s if request.inner_products else None, scale, probe_error),
            grad_norm_sq_error=None if inner is None else grad_norm_sq_error(inner, weight_sq_sum or 1 / b),
        )
        return pooled(found, sums.units * sums.freedom, request.ranks) if groups else found

    def _error(
        self, sums: WeightedSums, grad_norm_sq: float | None, scale: float, probe_error: float | None
    ) -> float | None:
        """Return the standard error of V: that of the examples and, where sketched, that of the probes in squares."""
        error = sums.variance_trace_error(grad_norm_sq, scale if self.part.norm_sq is not None else 1.0)
        if self.sketches is None or error is None:
            return error
        return None if probe_error is None else math.hypot(error, probe_error / sums.freedom)

    def _check_products(self, sums: WeightedSums, s: float, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Refuse inner products that do not add up: sum c_i <g_i, g> = s, whatever the layers are."""
        total, size = sums.products_in_sum()
        types = {g.dtype for g in gradients.values()} | {t for examples, *_ in self.kept for t in examples.types}
        if abs(total - s) > tolerance(types) * (size + s):
            raise InvalidMeasurement(
                f"the examples' gradients add up to {total:.6g} instead of |g|^2 = {s:.6g} along g: something besides "
                "them went into the gradient (a penalty on the weights, a weight used outside its layer)"
            )

    def _ratio(
        self, gradients: dict[nn.Parameter, Tensor], request: Request, sums: WeightedSums, scale: float
    ) -> float | None:
        assert request.coordinates is not None
        group: Mapping[nn.Parameter, Tensor] = self.part.gradients or gradients
        if self.totals:
            group = {p: scale * total for p, total in self.totals.items()}
        order = [p for p in gradients if p in self.square_sums or p in group]
        square_sums = [scale * self.square_sums.get(p, torch.zeros_like(p, dtype=torch.float64)) for p in order]
        variances = coordinate_variances(square_sums, [group.get(p, torch.zeros_like(p)) for p in order], sums)
        moment = request.second_moment
        moments = None if moment is None else [moment(p) for p in order]
        return reduce_ratio(variances, [gradients[p] for p in order], request.coordinates, moments)


def example_weights(value: Coefficients, n: int, device: torch.device) -> float | Tensor:
    """Return c_i as one number, or as float64 (n,).

    Args:
        value: What the caller gave.
        n: Number of examples.
        device: Where to put it.

    Returns:
        The weights.

    Raises:
        InvalidArgument: They are not n finite numbers >= 0.
    """
    if callable(value):
        value = value()
    if value is None:
        return 1 / n
    if isinstance(value, int | float):
        if not 0 <= value < math.inf:
            raise InvalidArgument(f"coefficients must be finite and >= 0, got {value}")
        return float(value)
    weights = torch.as_tensor(value, dtype=torch.float64, device=device).detach().flatten()
    if len(weights) != n:
        raise InvalidArgument(f"coefficients must hold one weight for each of the {n} examples, got {len(weights)}")
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise InvalidArgument("coefficients must be finite and must not be negative: give a row that must not count 0")
    return weights
