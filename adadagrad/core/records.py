r"""The records that travel: what was measured, what was seen, what was decided. Plain numbers, no torch.

Letters used below: b examples averaged into the step's gradient g, g_i the gradient of example i,
s = \|g\|^2, V the variance trace of one example's gradient, Vp the variance of p_i = <g_i, g>.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def quotient(numerator: float, denominator: float) -> float:
    """Divide as IEEE 754 does: x/0 is infinite with x's sign and 0/0 is NaN, where Python would raise.

    Args:
        numerator: Any float.
        denominator: Any float.

    Returns:
        The quotient; `math.nan` for 0/0.

    Example:
        >>> quotient(1.0, 0.0), quotient(0.0, 0.0), quotient(1.0, 4.0)
        (inf, nan, 0.25)
    """
    if denominator != 0:
        return numerator / denominator
    if numerator == 0 or math.isnan(numerator):
        return math.nan
    return math.copysign(math.inf, numerator) * math.copysign(1.0, denominator)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientStatistics:
    r"""The four numbers that every batch size test is arithmetic on.

    Args:
        num_examples: b, the examples averaged into g, over all micro-batches and ranks.
        grad_norm_sq: s = \|g\|^2 [grad^2].
        variance_trace: V, unbiased estimate of tr Sigma, the variance of one example's gradient [grad^2].
        inner_product_variance: Vp, sample variance of <g_i, g> over examples [grad^4]; None if not measured.
        coordinate_ratio: V_j / g_j^2 reduced over coordinates j [dimensionless]; None if not measured.
        num_units: How many units (examples or micro-batches) were measured; None means all examples.
        kind: What V was made of: ``"per_example"``, exact norms of examples; ``"probe"``, sketches of them;
            ``"micro_batch"``, gradients of micro-batches; ``"worker"``, gradients of ranks; or ``"drift"``, the way
            that each rank's model has gone in a round of local steps.
        weight_sq_sum: sum c_i^2 of the weights with which examples enter g; None means 1 / num_examples.
        variance_trace_error: Approximate standard error of V [grad^2]; None for fewer than three units.
        grad_norm_sq_error: Approximate standard error of s as an estimate of its mean, |grad F|^2 + V sum c_i^2
            [grad^2]; None without Vp.
        displaced: Whether gradients were taken away from the parameters, as extrapolating optimizers do: s, V and the
            rest then hold at the places where each rank evaluated, and V contains how far these lie apart.

    Example:
        >>> stats = GradientStatistics(num_examples=4, grad_norm_sq=5.0, variance_trace=9.0)
        >>> stats.true_grad_norm_sq, round(stats.noise_scale, 3), round(stats.critical_eta, 3)
        (2.75, 3.273, 0.671)
    """

    num_examples: int
    grad_norm_sq: float
    variance_trace: float
    inner_product_variance: float | None = None
    coordinate_ratio: float | None = None
    num_units: int | None = None
    kind: str = "per_example"
    weight_sq_sum: float | None = None
    variance_trace_error: float | None = None
    grad_norm_sq_error: float | None = None
    displaced: bool = False

    @property
    def mean_variance_factor(self) -> float:
        """The factor from V to the variance of g: sum c_i^2, which is 1/b for equal weights."""
        return 1 / self.num_examples if self.weight_sq_sum is None else self.weight_sq_sum

    @property
    def orthogonal_variance(self) -> float | None:
        """Vo = V - Vp / s, the variance orthogonal to g [grad^2]; exact identity, None without Vp."""
        if self.inner_product_variance is None:
            return None
        return self.variance_trace - quotient(self.inner_product_variance, self.grad_norm_sq)

    @property
    def true_grad_norm_sq(self) -> float:
        r"""Unbiased estimate s - V sum c_i^2 of \|grad F\|^2 [grad^2]; may be negative when noise dominates."""
        return self.grad_norm_sq - self.variance_trace * self.mean_variance_factor

    @property
    def noise_scale(self) -> float:
        """B_noise = V / true_grad_norm_sq in examples; infinite where that estimate is not positive."""
        if self.true_grad_norm_sq <= 0:
            return math.inf
        return self.variance_trace / self.true_grad_norm_sq

    @property
    def critical_eta(self) -> float:
        """Smallest eta for which the norm test passes at this batch size, sqrt(V sum c_i^2 / s)."""
        return _root(quotient(self.variance_trace * self.mean_variance_factor, self.grad_norm_sq))

    @property
    def critical_theta(self) -> float | None:
        """Smallest theta for which the inner product test passes, sqrt(Vp sum c_i^2 / s^2); None without Vp."""
        if self.inner_product_variance is None:
            return None
        return _root(quotient(self.inner_product_variance * self.mean_variance_factor, self.grad_norm_sq**2))

    @property
    def critical_nu(self) -> float | None:
        """Smallest nu for which the orthogonality test passes, sqrt(Vo sum c_i^2 / s); None without Vp."""
        orthogonal = self.orthogonal_variance
        if orthogonal is None:
            return None
        return _root(quotient(orthogonal * self.mean_variance_factor, self.grad_norm_sq))


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a policy may look at when it is asked for a batch size.

    Args:
        gradient: The measured statistics, None where this step was not measured.
        global_batch_size: Examples of the step just taken, over all ranks.
        samples_seen: Examples whose update has been applied so far, this step included.
        loss: Mean loss of the step.
        lr: Learning rate of the first parameter group in that step.
        dataset_size: N, examples in the data set.
        loss_average: Average of the loss over steps, where the policy asks for averages; None otherwise.
    """

    gradient: GradientStatistics | None = None
    global_batch_size: int | None = None
    samples_seen: int = 0
    loss: float | None = None
    lr: float | None = None
    dataset_size: int | None = None
    loss_average: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How one optimizer step is made of micro-batches.

    Args:
        global_batch_size: Examples per optimizer step, over all ranks and micro-batches.
        micro_batch_size: Most examples in one forward on one rank.
        accumulation_steps: Forwards per step on one rank.
        world_size: Number of ranks.
    """

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One step's record: what was seen, what was asked for, what comes next.

    Args:
        step: Number of the optimizer step, from 1, skipped ones counted.
        samples_seen: Examples whose update has been applied, this step included.
        progress: How much of the run's budget is done, this step included, in examples: `samples_seen`, or what the
            learning-rate rule counts in its place.
        observation: What the policy saw.
        requested: The policy's answer in examples, before rounding and bounds; None where it was not asked.
        requested_low: What it would have been, at least, with exact statistics, as far as their standard errors tell
            (one-sided, at `Bounds.confidence` or 0.9), in examples; None where the error of V is not known or the
            policy reads Vp or the coordinate ratio. Without `grad_norm_sq_error` it shows the error of V alone.
        requested_high: The same at most; may be infinite.
        plan: The plan of this step.
        next_plan: The plan of the next step.
        lr: Learning rate of the first parameter group in this step.
        reason: One word or phrase for what happened: ``"grow"``, ``"hold"``, ``"not measured"``, ...
    """

    step: int
    samples_seen: int
    progress: float
    observation: Observation
    requested: float | None
    requested_low: float | None = None
    requested_high: float | None = None
    plan: BatchPlan
    next_plan: BatchPlan
    lr: float
    reason: str


def _root(value: float) -> float:
    """Square root that clamps what rounding made slightly negative and passes NaN on."""
    return math.sqrt(value) if value > 0 else (value if math.isnan(value) else 0.0)
