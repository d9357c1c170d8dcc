r"""`EpochSums`: the statistics of a whole pass through the data, as if it had been one batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import GradientStatistics
from adadagrad.core.vectors import refuse_sparse, squared_norm
from adadagrad.statistics.combination import AbstractCombination


class EpochSums(AbstractCombination):
    r"""Add up squared norms and gradients over measured steps until they hold as many examples as the data set.

    .. math:: n = \sum_k b_k, \quad Q = \sum_k \bigl((b_k - 1) V_k + b_k s_k\bigr) = \sum_i \|g_i\|^2, \quad
              G = \sum_k b_k g_k = \sum_i g_i

    Then ``grad_norm_sq`` = |G / n|^2 and ``variance_trace`` = (Q - n |G / n|^2) / (n - 1), and the next epoch starts.
    So (V (n - 1) + n s) / (n^2 s) of that record is the gradient diversity Q / |G|^2 of arXiv 2509.16173.

    In code: for unequal weights c_i, Q adds b (s + V (1 - sum c_i^2)), which is the same where they are 1 / b. Where
    only a part of a step is measured, its V stands for the whole.

    When to use it: for a policy that wants the epoch (`DiveBatch`). What breaks it: the parameters move meanwhile, so
    what V says includes how the mean gradient has changed; and where not every step is measured an
    epoch takes as many more steps. The last step is not cut: n may exceed the data set by less than one batch. A step
    whose s or V is not finite is left out. The record has neither Vp nor coordinate ratio nor errors.

    Cost: one reading of the gradients per measured step, and one buffer of the model's size, in the parameters'
    type but at least float32 (two at the moment of adding, because a state that was taken stays as it was). Sums of a
    thousand float32 gradients are off by about 1e-6, far below the noise; float64 would cost twice the memory.

    Args:
        dataset_size: N, examples of an epoch, >= 2.

    Raises:
        InvalidArgument: `dataset_size` is no integer >= 2.

    Source: definition of the sums in arXiv 2509.16173 (DiveBatch). Differs from the paper: given as V and s.

    Example:
        >>> p = nn.Parameter(torch.zeros(1))
        >>> sums = EpochSums(dataset_size=4)
        >>> for g in (1.0, 3.0):  # examples 0, 2, and then 2, 4
        ...     p.grad = torch.tensor([g])
        ...     step = GradientStatistics(num_examples=2, grad_norm_sq=g * g, variance_trace=2.0)
        ...     epoch = sums.update(step, [p])
        >>> epoch.num_examples, epoch.grad_norm_sq, round(epoch.variance_trace, 4)  # of 0, 2, 2, 4
        (4, 4.0, 2.6667)
    """

    def __init__(self, dataset_size: int) -> None:
        check_integer(2, dataset_size=dataset_size)
        self.dataset_size = dataset_size
        self._gradients: list[Tensor | None] = []  # G by parameter; None where none has come yet
        self._start()

    def update(self, statistics: GradientStatistics, parameters: Iterable[nn.Parameter]) -> GradientStatistics | None:
        """Take in a measured step.

        Args:
            statistics: What was measured in it.
            parameters: The model's, with the step's gradient; see `AbstractCombination`.

        Returns:
            The epoch's record at its last step; None before.

        Raises:
            InvalidArgument: There are not as many parameters as at the last step, or their shapes are others.
        """
        b, s, v = statistics.num_examples, statistics.grad_norm_sq, statistics.variance_trace
        factor = statistics.mean_variance_factor
        squares = b * (s + v * (1 - factor))
        if not math.isfinite(squares):
            return None
        self._gradients = _added(self._gradients, list(parameters), b)
        self._examples += b
        self._units += b if statistics.num_units is None else statistics.num_units
        self._squares += squares
        self._weights_sq += b * b * factor
        return self._finished(statistics.kind) if self._examples >= self.dataset_size else None

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, numbers and tensors; see `AbstractCombination`."""
        return {
            "examples": self._examples,
            "units": self._units,
            "squares": self._squares,
            "weights_sq": self._weights_sq,
            "gradients": list(self._gradients),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, on any device; see `AbstractCombination`."""
        self._examples, self._units = int(state["examples"]), int(state["units"])
        self._squares, self._weights_sq = float(state["squares"]), float(state["weights_sq"])
        self._gradients = list(state["gradients"])

    def _start(self) -> None:
        """Begin an epoch."""
        self._examples, self._units, self._squares, self._weights_sq = 0, 0, 0.0, 0.0
        self._gradients = []

    def _finished(self, kind: str) -> GradientStatistics:
        """Return the record of the epoch as one batch, and begin the next."""
        n, q, weight_sq_sum = self._examples, self._squares, self._weights_sq / self._examples**2
        s = float(squared_norm([g for g in self._gradients if g is not None])) / n**2
        units = self._units
        self._start()
        return GradientStatistics(
            num_examples=n,
            grad_norm_sq=s,
            variance_trace=(q / n - s) / (1 - weight_sq_sum),
            num_units=units,
            kind=kind,
            weight_sq_sum=weight_sq_sum,
        )


@torch.no_grad()
def _added(sums: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], b: int) -> list[Tensor | None]:
    """Return new sums with b times the gradients added; None stands for zero on either side."""
    before = sums or [None] * len(parameters)
    fits = [x is None or x.shape == p.shape for x, p in zip(before, parameters, strict=False)]
    if len(before) != len(parameters) or not all(fits):
        raise InvalidArgument("parameters must be the same ones in the same order at every step of an epoch")
    added = [None if x is None else x.to(p.device) for x, p in zip(before, parameters, strict=True)]
    held = {k: _wide(p.grad) for k, p in enumerate(parameters) if p.grad is not None}
    if held:
        present = [torch.zeros_like(g) if (x := added[k]) is None else x for k, g in held.items()]
        for k, total in zip(held, torch._foreach_add(present, list(held.values()), alpha=b), strict=True):
            added[k] = total
    return added


def _wide(gradient: Tensor) -> Tensor:
    """Return a gradient in its own type, but at least float32."""
    return refuse_sparse(gradient).to(torch.promote_types(gradient.dtype, torch.float32))
