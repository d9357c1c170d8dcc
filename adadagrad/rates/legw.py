"""LEGW: the square root of the scale, after a warm-up that lasts as many more epochs as the batch is larger."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adadagrad.core.checks import check_at_least, check_integer
from adadagrad.core.protocols import RateState
from adadagrad.core.step_scale import StepScale
from adadagrad.rates.base import AbstractRate


@dataclass(frozen=True, slots=True)
class LEGW(AbstractRate):
    r"""Scale the learning rate by sqrt(s), and warm it up over s times as many epochs (linear-epoch gradual warm-up).

    .. math:: f = \sqrt{s} \, \min(1, t / W), \qquad W = e_0 \, s \, N

    In code: s is `StepScale.scale`, t `progress` and N `dataset_size`, both in examples, e_0 `base_warmup_epochs`.

    Use it where large batches diverge at the start; it was proposed for recurrent networks. It contains the warm-up,
    so give no schedule that warms up too. At a fixed batch the warm-up takes e_0 N / b_0 steps, whatever the scale:
    it is long in epochs only. A batch that grows during training goes back into the longer warm-up if t is still
    below the new W: from s = 1 at the end of its warm-up to s = 4, the factor falls from 1 to 2 / 4. At progress 0 the
    factor is 0, as in the schedules: the very first update moves nothing. Costs nothing.

    Args:
        base_warmup_epochs: e_0, epochs of warm-up at the base batch, >= 0. 0 is `SquareRootScaling`.
        base_batch_size: b_0, for which the optimizer's learning rate and e_0 were chosen, >= 1 [examples]. Smaller
            gives larger factors and longer warm-ups. None is the first batch size of the run.

    Raises:
        InvalidArgument: base_warmup_epochs < 0 or not finite, or base_batch_size is not an integer >= 1.

    Source: You et al. (2019), "Large-Batch Training for LSTM and Beyond", arXiv 1901.08256 (verified in
        petuum/adaptdl, scaling_rules.py at 542e123).
    Differs: adaptdl's t counts scale-invariant iterations, that is the gain of each step; here t counts examples seen,
        so that the warm-up lasts the epochs of the rule's name.

    Example:
        >>> rule = LEGW(base_warmup_epochs=0.5)
        >>> at = dict(global_batch_size=256, base_batch_size=64, dataset_size=1000)  # W = 0.5 * 4 * 1000
        >>> [rule.factor(rule.start(), StepScale(progress=t, **at)) for t in (0, 500, 2000, 5000)]
        [0.0, 0.5, 2.0, 2.0]
    """

    base_warmup_epochs: float
    base_batch_size: int | None = None

    def __post_init__(self) -> None:
        check_at_least(0, base_warmup_epochs=self.base_warmup_epochs)
        if self.base_batch_size is not None:
            check_integer(1, base_batch_size=self.base_batch_size)

    def factor(self, state: RateState, step: StepScale) -> float:
        """Return sqrt(s), or the part of it that the warm-up has reached; it does not depend on the state."""
        warmup = self.base_warmup_epochs * step.scale * step.dataset_size
        return math.sqrt(step.scale) * (step.progress / warmup if step.progress < warmup else 1.0)
