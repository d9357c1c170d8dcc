"""The gradient noise scale: how many examples it takes until noise and signal are equally strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from adadagrad.core.checks import check_positive
from adadagrad.core.records import Observation, quotient
from adadagrad.policies.base import AbstractPolicy, check_averaging


@dataclass(frozen=True, slots=True)
class GradientNoiseScale(AbstractPolicy):
    r"""Ask for a fraction of the gradient noise scale, the batch size at which noise and signal are equally strong.

    .. math:: \mathcal{B}_{\text{noise}} = \frac{\operatorname{tr} \Sigma}{\|\nabla F\|^2},
              \qquad T = c \, \mathcal{B}_{\text{noise}}

    In code: V = `variance_trace` stands for tr Sigma, `true_grad_norm_sq` = s - V/b for the squared norm, c is
    `fraction`. Both are averaged over steps, each by itself, before they are divided: a ratio of noisy numbers is
    biased, a ratio of means hardly. At b = c B_noise a run needs 1 + c times as many examples E as a very small batch
    would, and 1 + 1/c times as many steps S as a very large one, from (E/E_min - 1)(S/S_min - 1) = 1; the best learning
    rate is that of very large batches, divided by 1 + 1/c (from memory, unverified (high)). c = 1 pays double in both.

    The norm test asks for V / (eta^2 s), which with eta = 1/sqrt(c) is the same but for the noise in s = |g|^2: there
    s is at least about V/b, so one test asks for at most about b/eta^2. Here that part is taken out: the
    request may be far away at once (`Bounds.max_growth` limits that), and the batch may shrink too.

    Where noise dominates, `true_grad_norm_sq` of one step is as often negative as not: average. Where the average is
    not positive the request is infinite, and NaN where V is zero too; both hold the batch unless
    `Bounds.on_infinite` says otherwise. It is the simple scale, with no Hessian in it, and for the
    language models of OLMo it underestimates the critical batch size by orders of magnitude (arXiv 2505.23971, verified
    in the full text): take c from a run of your own. Constant time and memory, given the statistics.

    To watch it without changing the batch, train with ``policy=ConstantBatch()`` and
    ``measure=Measure(estimator=ExponentialAverage())``: the noise scale in the log is then the averaged one.

    Args:
        fraction: c, > 0, dimensionless. Smaller asks for smaller batches: fewer examples in all, more steps.
        averaging: Decay of the exponential averages, in (0, 1), per measured step; nearer to 1 is smoother and later.
            None takes each step by itself.

    Raises:
        InvalidArgument: fraction <= 0 or not finite; averaging is neither None nor in (0, 1).

    Source: McCandlish, Kaplan, Amodei et al. (2018), "An Empirical Model of Large-Batch Training", arXiv 1812.06162:
        B_simple, and eq. A.2 for the estimator from gradients at two batch sizes (verified in
        CerebrasResearch/nanoGNS, exact/ddpgns.py, which cites it and averages with 0.995). With one example as the
        small batch and the step as the big one, that estimator is (s - V/b, V) exactly.
    Differs from the paper: there B_simple is a diagnostic; asking for a fraction of it is our extension.

    Example:
        >>> from adadagrad.core.records import GradientStatistics
        >>> stats = GradientStatistics(num_examples=8, grad_norm_sq=5.0, variance_trace=16.0)
        >>> GradientNoiseScale(fraction=0.5).required_batch_size(Observation(gradient=stats))  # 16 / (5 - 16/8) / 2
        2.6666666666666665
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})
    monotone: ClassVar[bool] = False

    fraction: float = 1.0
    averaging: float | None = 0.95

    def __post_init__(self) -> None:
        check_positive(fraction=self.fraction)
        check_averaging(self.averaging)

    def required_batch_size(self, observation: Observation) -> float:
        """Return the fraction of the noise scale, in examples, neither rounded nor bounded."""
        v, signal = self.measured(observation, "variance_trace", "true_grad_norm_sq")
        return quotient(self.fraction * v, 0.0 if signal <= 0 else signal)
