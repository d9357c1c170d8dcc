r"""`ExponentialAverage`: any estimator, averaged over the measured steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from adadagrad.statistics.averaged_instrument import AveragedInstrument
from adadagrad.statistics.base import AbstractEstimator, Request, check_estimator
from adadagrad.statistics.choosing import choose_estimator
from adadagrad.statistics.running import RunningStatistics, check_decay


@dataclass(frozen=True, slots=True)
class ExponentialAverage(AbstractEstimator):
    r"""Average what another estimator measures over steps, so that every policy reads less noisy numbers.

    .. math:: \bar V = \frac{\sum_k \beta^{n-k} V_k}{\sum_k \beta^{n-k}}, \qquad
              \bar s = \overline{s - V \textstyle\sum c_i^2} + \bar V \sum_i c_i^2

    In code: V and the unbiased estimate of |grad F|^2, which do not depend on the batch size, are averaged apart, and
    `grad_norm_sq` is rebuilt for the batch size of the present step. What happens to the other numbers, and what the
    standard errors then mean, is said at `adadagrad.statistics.running.RunningStatistics`.

    When to use it: where single steps are too noisy for the policy, above all for the noise scale and for small
    batches, where one step's estimate of |grad F|^2 is often negative. It does not help a test against its bias from
    |g|^2 at small batches, because s is rebuilt with it. What breaks it: statistics that change within
    1 / (1 - decay) measured steps are followed too late, and that is not in the errors; ``every="auto"`` makes the
    window longer in steps of training. In an engine it takes the place of the average that a policy asks for itself
    (`AbstractPolicy.averaging`). Cost: that of the other estimator, and a few plain numbers.

    Args:
        estimator: What measures, or ``"auto"``: `PerExample`, or `MicroBatch` where a module mixes examples, chosen
            once, when it goes to work on the model.
        decay: beta, in (0, 1), dimensionless, per measured step. Smaller is noisier and follows training faster: 0.95
            averages over about 20 measured steps and has 0.16 of one step's error, 0.995 over 200 and 0.05.

    Raises:
        InvalidArgument: `estimator` is neither an estimator nor ``"auto"``, or `decay` not between 0 and 1.

    Source: McCandlish, Kaplan, Amodei (2018), arXiv 1812.06162, appendix A (separate averages, then the ratio; from
        memory, unverified (high)); debiased with decay 0.995 in CerebrasResearch/nanoGNS (verified in
        exact/ddpgns.py). CABS averages with 0.95 (verified in ProbabilisticNumerics/cabs).
    Differs from the paper: both numbers come from one batch, and s is rebuilt so that batch size tests can read it too.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1, bias=False)
        >>> instrument = ExponentialAverage(decay=0.5).open(model, Request())
        >>> for inputs in ([[1.0], [3.0]], [[2.0], [2.0]]):  # V = 2, then 0
        ...     model.zero_grad()
        ...     with instrument.micro_batch():
        ...         model(torch.tensor(inputs)).mean().backward()
        ...     statistics = instrument.finish()
        >>> round(statistics.variance_trace, 6)  # (1/2 * 2 + 1 * 0) / (1/2 + 1)
        0.666667
    """

    estimator: AbstractEstimator | str = "auto"
    decay: float = 0.95

    def __post_init__(self) -> None:
        check_estimator(self.estimator)
        check_decay(self.decay)

    @property
    def innermost(self) -> AbstractEstimator:
        """The estimator that measures; this one itself while it is ``"auto"``, until `settled`."""
        return self.estimator.innermost if isinstance(self.estimator, AbstractEstimator) else self

    def settled(self, model: nn.Module) -> AbstractEstimator:
        """Return the same average of an estimator that fits the model.

        Args:
            model: The model to be measured.

        Returns:
            An `ExponentialAverage` without ``"auto"``.
        """
        given = check_estimator(self.estimator)
        return replace(self, estimator=choose_estimator(model) if given is None else given.settled(model))

    def open(self, model: nn.Module, request: Request) -> AveragedInstrument:
        """Go to work on a model.

        Args:
            model: The module whose trainable parameters are measured.
            request: The numbers wanted.

        Returns:
            The instrument, with an average of nothing.
        """
        given = check_estimator(self.estimator)
        inner = choose_estimator(model) if given is None else given
        return AveragedInstrument(inner.open(model, request), RunningStatistics(self.decay))
