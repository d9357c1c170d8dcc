r"""MaxVA: weights of the past that make the observed variance of each coordinate as large as it can be."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adadagrad.core.checks import check_at_least, check_below_one, check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.shards import local_part
from adadagrad.core.vectors import HALVES
from adadagrad.optimizers.base import AbstractOptimizer, as_number


class AbstractMaxVA(AbstractOptimizer):
    r"""An optimizer whose second moment forgets at a rate that each coordinate chooses at each step.

    .. math:: \tilde u_t = B_t \tilde u_{t-1} + (1 - B_t) g_t, \quad
        \tilde v_t = B_t \tilde v_{t-1} + (1 - B_t) g_t^2, \quad w_t = B_t w_{t-1} + (1 - B_t)

    .. math:: B_t = \operatorname{clip} \Big( \frac{D + s^2}{w_{t-1} (D - s^2) + D + s^2}, B_{lo}, B_{hi} \Big), \quad
        D = (g_t - u_{t-1})^2, \quad u = \tilde u / w, \quad s^2 = \tilde v / w - u^2

    In code: ``grad_avg``, ``grad_avg_sq`` and ``weight``, all starting at 0. s² is clamped at 0. Where D = s² = 0 (a
    constant gradient) B is B_lo, as in the published code. The state of half-precision parameters is float32.
    """

    @abc.abstractmethod
    def advance(self, group: dict[str, Any], params: list[Tensor], *, first: bool) -> None:
        """Do a step of some parameters of a group.

        Args:
            group: Their group.
            params: Those that have a gradient, all at their first step or none.
            first: Whether it is that.
        """

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move some parameters of a group.

        Args:
            group: Their group.
            params: Those that have a gradient.
        """
        new = {param: None for param in params if "weight" not in self.state[param]}
        for some, first in ((list(new), True), ([param for param in params if param not in new], False)):
            if some:
                self.advance(group, some, first=first)

    def variance(self, param: Tensor) -> Tensor:
        """Return the observed variance s² of each entry of a parameter.

        It is made large on purpose, and lags behind a change of the batch size: an indicator, no estimate.

        Args:
            param: One of the parameters.

        Returns:
            Tensor of its shape [grad^2], of this rank's part where it is sharded; zeros before its first step.
        """
        if "weight" not in self.state[param]:
            return zeros_for(local_part(param))
        average, square, weight = _averages(self.state[param])
        mean = average / weight
        return (square / weight - mean * mean).clamp(min=0)

    def betas_of(self, param: Tensor) -> Tensor:
        """Return the weights of the past that the gradient which is there would be given by `step`.

        Args:
            param: One of the parameters, with a gradient.

        Returns:
            Tensor of its shape, between B_lo and B_hi.

        Raises:
            InvalidArgument: It has no gradient.
        """
        if param.grad is None:
            raise InvalidArgument("betas_of needs a parameter with a gradient: call it between backward and step")
        group = self._group_of(param)
        (grad,) = wide([local_part(param.grad)], maximize=group["maximize"])
        first = "weight" not in self.state[param]
        us, vs, ws = ([t] for t in (3 * (torch.zeros_like(grad),) if first else _averages(self.state[param])))
        return 1 - weights_of_new(us, vs, ws, [grad], group["beta_range"], first=first)[0]

    def beta_stats(self) -> dict[str, tuple[float, float, float]]:
        """Return where the betas of the present gradient lie.

        Returns:
            For each parameter with a gradient, by name or number: the shares of entries at B_lo, at B_hi, and between.
        """
        found = {}
        for name, param in self.named():
            if param.grad is not None:
                betas = self.betas_of(param)
                low, high = self._group_of(param)["beta_range"]
                at_low = float((betas <= low * (1 + 1e-6)).double().mean())
                at_high = float((betas >= high * (1 - 1e-6)).double().mean()) if high > low else 0.0
                found[name] = (at_low, at_high, 1 - at_low - at_high)
        return found

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is param for p in group["params"]))

    def noise_proxy(self) -> dict[str, float]:
        """Return sum s² over sum u², a cheap indicator of noise against signal; biased high, because s² is maximised.

        Returns:
            For each parameter by name or number, and for all together under ``"all"``; infinite where u is 0.
        """
        found, totals = {}, [0.0, 0.0]
        for name, param in self.named():
            if "weight" in self.state[param]:
                average, _, weight = _averages(self.state[param])
                sums = float(self.variance(param).double().sum()), float((average / weight).double().square().sum())
                totals = [total + part for total, part in zip(totals, sums, strict=True)]
                found[name] = sums[0] / sums[1] if sums[1] else float("inf")
        return {**found, "all": totals[0] / totals[1] if totals[1] else float("inf")}


def check_maxva(options: Mapping[str, Any]) -> None:
    """Refuse options out of range that both optimizers have.

    Args:
        options: Of a group.

    Raises:
        InvalidArgument: One is.
    """
    check_at_least(0, lr=as_number(options["lr"]), weight_decay=options["weight_decay"])
    check_below_one(momentum=options["momentum"])
    check_positive(eps=options["eps"])
    values = options["beta_range"]
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise InvalidArgument(f"beta_range must be two numbers such as (0.5, 0.999), got {values!r}")
    check_below_one(**{"beta_range[0]": values[0], "beta_range[1]": values[1]})
    if values[0] > values[1]:
        raise InvalidArgument(f"beta_range must be (smallest, largest), got {values!r}: turn it round")


def weights_of_new(
    averages: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    grads: list[Tensor],
    beta_range: tuple[float, float],
    *,
    first: bool,
) -> list[Tensor]:
    r"""Return 1 - B_t for each coordinate.

    With numerator and denominator of B multiplied by w², nothing need be divided by w:

    .. math:: w^2 D = (\tilde u - w g)^2, \qquad w^2 s^2 = w \tilde v - \tilde u^2

    Args:
        averages: ũ_{t-1}.
        squares: ṽ_{t-1}.
        weights: w_{t-1}, positive unless `first`.
        grads: g_t.
        beta_range: B_lo and B_hi.
        first: Whether nothing has been seen: B is then B_hi, and B_lo where the gradient is 0.

    Returns:
        New tensors of the same shapes.
    """
    low, high = beta_range
    if low == high:
        return [torch.full_like(weight, 1 - low) for weight in weights]
    if first:
        return [torch.full_like(grad, 1 - low).masked_fill_(grad != 0, 1 - high) for grad in grads]
    distances = torch._foreach_addcmul(averages, weights, grads, -1)
    torch._foreach_mul_(distances, distances)
    spreads = torch._foreach_mul(weights, squares)
    torch._foreach_addcmul_(spreads, averages, averages, -1)
    torch._foreach_clamp_min_(spreads, 0)
    sums = torch._foreach_add(distances, spreads)
    torch._foreach_sub_(distances, spreads)
    divisors = torch._foreach_addcmul(sums, weights, distances)
    torch._foreach_add_(divisors, torch.finfo(averages[0].dtype).tiny)  # 0 / 0 becomes 0, and so B_lo
    torch._foreach_div_(sums, divisors)
    torch._foreach_clamp_min_(sums, low)
    torch._foreach_clamp_max_(sums, high)
    torch._foreach_neg_(sums)
    torch._foreach_add_(sums, 1)
    return list(sums)


def remember(
    averages: list[Tensor], squares: list[Tensor], weights: list[Tensor], grads: list[Tensor], news: list[Tensor]
) -> None:
    """Let the three averages take in a gradient, in place.

    Args:
        averages: ũ.
        squares: ṽ.
        weights: w.
        grads: g.
        news: 1 - B.
    """
    torch._foreach_lerp_(averages, grads, news)
    torch._foreach_lerp_(squares, torch._foreach_mul(grads, grads), news)
    torch._foreach_addcmul_(weights, news, weights, -1)
    torch._foreach_add_(weights, news)


def denominators(
    squares: list[Tensor], weights: list[Tensor], highest: list[Tensor] | None, eps: float
) -> list[Tensor]:
    r"""Return sqrt(ṽ / w) + eps, or with `highest` the largest root so far.

    Args:
        squares: ṽ.
        weights: w, positive.
        highest: The largest roots so far, which are changed; None to do without.
        eps: > 0 [grad].

    Returns:
        New tensors.
    """
    roots = torch._foreach_div(squares, weights)
    torch._foreach_sqrt_(roots)
    if highest is not None:
        torch._foreach_maximum_(highest, roots)
        torch._foreach_copy_(roots, highest)
    torch._foreach_add_(roots, eps)
    return list(roots)


def wide(grads: list[Tensor], *, maximize: bool) -> list[Tensor]:
    """Return gradients as the averages take them in: at least in float32, because 1 - B is lost beside 1 in less.

    Args:
        grads: The gradients; left alone.
        maximize: Whether to turn them round.

    Returns:
        The same tensors, or new ones.
    """
    if grads[0].dtype in HALVES:
        grads = [grad.float() for grad in grads]
    return list(torch._foreach_neg(grads)) if maximize else grads


def zeros_for(param: Tensor) -> Tensor:
    """Return an average of nothing for a parameter, in float32 where the parameter has less.

    Args:
        param: The parameter.

    Returns:
        Zeros of its shape, sharded as it is.
    """
    return torch.zeros_like(param, dtype=torch.float32 if param.dtype in HALVES else param.dtype)


def _averages(state: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return local_part(state["grad_avg"]), local_part(state["grad_avg_sq"]), local_part(state["weight"])
