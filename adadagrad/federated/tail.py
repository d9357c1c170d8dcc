r"""How heavy the tail of the channel's noise is, from what the server hears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adadagrad.core.errors import InvalidMeasurement

EULER = 0.5772156649015329
LEAST = 100
"""Residuals below which an estimate says nothing."""
HEAVIEST = 1.01
"""The smallest tail index that an estimate hands to an optimizer: at 1 there is no mean."""


@dataclass(frozen=True, slots=True)
class TailEstimate:
    """A tail index and a scale, with how sure they are.

    Args:
        alpha: Tail index, at most 2.
        alpha_error: Its standard error, from the spread of the logarithms; of independent residuals.
        scale: Scale c of the residuals [their unit].
        count: Residuals that went in.
    """

    alpha: float
    alpha_error: float
    scale: float
    count: int

    @property
    def usable_alpha(self) -> float:
        """The index, kept between 1.01 and 2, as the server's optimizers take it."""
        return min(2.0, max(HEAVIEST, self.alpha))


def estimate_tail(residuals: Tensor) -> TailEstimate:
    r"""Estimate tail index and scale of symmetric alpha-stable numbers from the moments of their logarithms.

    .. math:: \text{Var} \log|X| = \frac{\pi^2}{6} \left(\frac{1}{\alpha^2} + \frac{1}{2}\right), \qquad
        E \log|X| = \gamma \left(\frac{1}{\alpha} - 1\right) + \log c

    with Euler's constant gamma. Logarithms have all moments, also where X itself has no variance. Zeros are left out.

    Args:
        residuals: Numbers of any shape, at least 100 of them finite and not zero.

    Returns:
        The estimate; an index that comes out above 2 is 2.

    Raises:
        InvalidMeasurement: Fewer than 100 numbers are usable.

    Source: Ma, Nikias (1995), "Parameter estimation and blind channel identification in impulsive signal environments"
        (from memory, unverified (medium); both moments are checked against samples in the tests).
    Differs from the paper: the standard error is ours, by the delta method.

    Example:
        >>> import torch
        >>> from adadagrad.federated.stable import sample_alpha_stable
        >>> x = sample_alpha_stable((100_000,), 1.5, 0.1, generator=torch.Generator().manual_seed(0))
        >>> found = estimate_tail(x)
        >>> round(found.alpha, 1), round(found.scale, 2)
        (1.5, 0.1)
    """
    logs = _logarithms(residuals)
    powers = [float((logs**power).sum()) for power in range(1, 5)]
    return _from_sums(len(logs), powers)


class ResidualTail:
    """Follow the noise of a channel over rounds by the differences of what is heard in successive ones.

    What is heard is signal and noise. Signals of successive rounds are nearly equal where steps are small, so that the
    difference is noise: with tail index alpha and 2^(1/alpha) times its scale. Where the signal changes as much as the
    noise, or fading multiplies a large one, the index comes out too high, since that change has a variance.

    Rounds enter in pairs that do not overlap, so that residuals are independent: every second round adds. It keeps five
    numbers and, between the two rounds of a pair, one message.

    Example:
        >>> import torch
        >>> tail = ResidualTail()
        >>> _ = torch.manual_seed(0)
        >>> for _ in range(20):
        ...     tail.update({"w": 1.0 + torch.randn(1000)})  # normal noise of variance 1 = 2 c^2
        >>> round(tail.estimate().alpha, 1), round(tail.estimate().scale, 1)
        (2.0, 0.7)
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums = [0.0] * 4
        self._last: dict[str, Tensor] | None = None

    def update(self, heard: Mapping[str, Tensor]) -> None:
        """Take in what the server has heard in a round.

        Args:
            heard: By name, as the channel returns it.
        """
        if self._last is None:
            self._last = {name: tensor.detach().clone() for name, tensor in heard.items()}
            return
        for name, tensor in heard.items():
            logs = _logarithms(tensor.detach() - self._last[name])
            self.count += len(logs)
            for power in range(4):
                self._sums[power] += float((logs ** (power + 1)).sum())
        self._last = None

    def estimate(self) -> TailEstimate:
        """Return the estimate of the noise itself, its scale that of one round.

        Raises:
            InvalidMeasurement: Fewer than 100 residuals have come in.
        """
        found = _from_sums(self.count, self._sums)
        scale = found.scale / 2 ** (1 / found.alpha)
        return TailEstimate(alpha=found.alpha, alpha_error=found.alpha_error, scale=scale, count=found.count)

    def state_dict(self) -> dict[str, Any]:
        """Return all that it remembers."""
        return {"count": self.count, "sums": list(self._sums), "last": self._last}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state.

        Args:
            state_dict: What `state_dict` returned.
        """
        self.count, self._sums, self._last = state_dict["count"], list(state_dict["sums"]), state_dict["last"]


def _logarithms(residuals: Tensor) -> Tensor:
    wide = residuals.detach().double().abs().flatten()
    return wide[(wide > 0) & wide.isfinite()].log()


def _from_sums(count: int, sums: list[float]) -> TailEstimate:
    """Solve the two equations; the error of the index is that of the variance over the slope of its formula."""
    if count < LEAST:
        raise InvalidMeasurement(f"the tail needs at least {LEAST} residuals that are not zero, got {count}")
    mean, second, third, fourth = (value / count for value in sums)
    variance = second - mean**2
    central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
    inverse_sq = max(0.25, 6 * variance / math.pi**2 - 0.5)  # 1 / alpha^2, at most 2 for alpha
    alpha = inverse_sq**-0.5
    variance_error = math.sqrt(max(0.0, central - variance**2) / count)
    slope = math.pi**2 / 3 / alpha**3
    return TailEstimate(
        alpha=alpha,
        alpha_error=variance_error / slope,
        scale=math.exp(mean - EULER * (1 / alpha - 1)),
        count=count,
    )
