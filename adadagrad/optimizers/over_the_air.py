r"""AdaGrad-OTA and Adam-OTA: server steps for gradients that arrive through a channel with heavy-tailed noise."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from adadagrad.core.checks import check_at_least, check_below_one, check_betas, check_tail_index
from adadagrad.core.vectors import HALVES
from adadagrad.optimizers.base import AbstractOptimizer, add_quotients_, buckets, multiply_


class AbstractOverTheAir(AbstractOptimizer):
    """A smoothed gradient over the root of a sum of its powers; the two methods differ in how powers are summed."""

    @abc.abstractmethod
    def weights(self, group: Mapping[str, Any]) -> tuple[float, float, float]:
        """Return the weight of the past in the smoothed gradient, that in the powers, and that of a new power.

        Args:
            group: Options.
        """

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse what is out of range of the options that both have.

        Args:
            options: Of a group.
        """
        check_at_least(0, lr=options["lr"], eps=options["eps"], weight_decay=options["weight_decay"])
        check_tail_index(alpha=options["alpha"])

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move some parameters of a group: smooth, take in the power, step.

        Args:
            group: Their group.
            params: Those that have a gradient.
        """
        past, kept, taken = self.weights(group)
        power, lr, decay = group["alpha"], group["lr"], group["weight_decay"]
        grads = [param.grad for param in params if param.grad is not None]
        states = [self._state(param) for param in params]
        lists = [params, grads, [s["exp_avg"] for s in states], [s["power_sum"] for s in states]]
        for (xs, gs, ms, vs), _ in buckets(lists):
            signed = torch._foreach_neg(gs) if group["maximize"] else gs
            wide = [g.float() for g in signed] if gs[0].dtype in HALVES else list(signed)
            torch._foreach_lerp_(ms, wide, 1 - past)
            if kept != 1:
                torch._foreach_mul_(vs, kept)
            torch._foreach_add_(vs, _powers(ms, power), alpha=taken)
            roots = _roots(vs, power)
            torch._foreach_add_(roots, group["eps"])
            if decay != 0:
                multiply_(xs, 1 - lr * decay)
            if group["eps"] == 0:
                _divide_nothing_by_one(roots)
            add_quotients_(xs, ms, roots, [-lr] * len(xs))

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            wide = torch.float32 if param.dtype in HALVES else param.dtype
            state["exp_avg"] = torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)
            state["power_sum"] = torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)
        return state


def _powers(tensors: Sequence[Tensor], power: float) -> list[Tensor]:
    """|x|^power, by a product where the power is 2: the same numbers as torch's own optimizers."""
    if power == 2:
        return list(torch._foreach_mul(list(tensors), list(tensors)))
    return list(torch._foreach_pow(torch._foreach_abs(list(tensors)), power))


def _roots(tensors: Sequence[Tensor], power: float) -> list[Tensor]:
    """x^(1/power), by a square root where the power is 2."""
    return list(torch._foreach_sqrt(list(tensors)) if power == 2 else torch._foreach_pow(list(tensors), 1 / power))


def _divide_nothing_by_one(roots: Sequence[Tensor]) -> None:
    """With eps = 0 a coordinate that has had no gradient yet would move by 0/0: let it move by 0/1."""
    for root in roots:
        root.masked_fill_(root == 0, 1.0)


@final
class OverTheAirAdaGrad(AbstractOverTheAir):
    r"""AdaGrad with a power alpha of the smoothed gradient where AdaGrad has the square: AdaGrad-OTA.

    .. math:: \Delta_t = \beta_1 \Delta_{t-1} + (1 - \beta_1) g_t, \quad v_t = v_{t-1} + |\Delta_t|^\alpha, \quad
        w_{t+1} = w_t - \eta \frac{\Delta_t}{v_t^{1/\alpha} + \epsilon}

    In code: g_t is ``p.grad``, the gradient as it comes out of the channel (`adadagrad.federated.Channel`); Delta is
    ``exp_avg``, v ``power_sum``. The powers are those of the smoothed gradient, not of the gradient; there is no bias
    correction, and epsilon stands outside the root.

    For the server of a federated training whose gradients are added up by a radio channel with heavy-tailed
    interference, and for any gradient whose noise has no variance. `alpha` is a setting of its own and need not be the
    channel's: in our experiments (docs/results.md) the fractional power has no advantage over 2. v never falls, so
    steps shrink for ever; a power beyond the largest number of the dtype (|g| about 1e19 in float32 at 2, 1e25 at 1.5)
    stops its coordinate for good. With eps = 0 multiplying all gradients by a number changes nothing, as long as no
    power leaves the range of the dtype (in float32 |g| from 1e-30 on at 1.5). Two tensors of the parameter's size, as
    Adam; two powers a coordinate, which cost more than Adam's root unless alpha is 2.

    Args:
        params: Parameters, named parameters or groups; a group may set every option for itself.
        lr: eta, >= 0 [parameter units]. There is no default: compare methods each at its own best rate.
        alpha: Power and root, above 1 and at most 2. Smaller lets one huge gradient weigh less in later steps.
        beta1: Weight of the past in the smoothed gradient, in [0, 1).
        eps: >= 0 [grad], outside the root.
        weight_decay: Decoupled decay, >= 0.
        maximize: Ascend instead.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter is complex.

    Source: Wang, Chen, Pappas, Yang, Quek, Poor (2024), "Adaptive federated learning over the air", arXiv 2403.06528
        (the abstract is verified; the update is second-hand, on whose form three notes agree).
    Differs from the paper: weight decay and `maximize` are added; the default of eps is ours. With alpha = 2 and
        beta1 = 0 it is torch.optim.Adagrad.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = OverTheAirAdaGrad([x], lr=0.1, beta1=0.0)
        >>> x.grad = torch.tensor([1e6, -0.01])
        >>> optimizer.step()  # the first step is lr times the sign, however large the gradient
        >>> x.detach()
        tensor([0.9000, 1.1000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        alpha: float = 1.5,
        beta1: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "alpha": alpha, "beta1": beta1, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "maximize": maximize})

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the class.

        Args:
            options: Of a group.
        """
        super().check(options)
        check_below_one(beta1=options["beta1"])

    def weights(self, group: Mapping[str, Any]) -> tuple[float, float, float]:
        """Return the weights; powers are added up.

        Args:
            group: Options.
        """
        return group["beta1"], 1.0, 1.0


@final
class OverTheAirAdam(AbstractOverTheAir):
    r"""The same with an average of the powers instead of their sum: Adam-OTA.

    .. math:: \Delta_t = \beta_1 \Delta_{t-1} + (1 - \beta_1) g_t, \quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) |\Delta_t|^\alpha, \quad
        w_{t+1} = w_t - \eta \frac{\Delta_t}{v_t^{1/\alpha} + \epsilon}

    In code, cost and uses: as `OverTheAirAdaGrad`. Steps do not shrink by themselves: lower `lr`. Without bias
    correction the first step is eta / (1 - beta2)^(1/alpha) in each coordinate, whatever beta1.

    Args:
        params: Parameters, named parameters or groups; a group may set every option for itself.
        lr: eta, >= 0 [parameter units]; no default.
        alpha: Power and root, above 1 and at most 2.
        betas: Weights of the past in the smoothed gradient and in the powers, each in [0, 1). The sources contradict
            each other on the second: 0.3 is what we ran.
        eps: >= 0 [grad], outside the root.
        weight_decay: Decoupled decay, >= 0.
        maximize: Ascend instead.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter is complex.

    Source: as `OverTheAirAdaGrad`.
    Differs from the paper: weight decay and `maximize` are added; the defaults of beta2 and eps are ours. With
        alpha = 2 and beta1 = 0 it is torch.optim.RMSprop with alpha = beta2, and not Adam: no bias correction, and the
        powers are those of the smoothed gradient.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = OverTheAirAdam([x], lr=0.1, alpha=2.0, betas=(0.0, 0.75))
        >>> x.grad = torch.tensor([8.0])
        >>> optimizer.step()  # moves by lr / sqrt(1 - 0.75)
        >>> x.detach()
        tensor([0.8000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        alpha: float = 1.5,
        betas: tuple[float, float] = (0.9, 0.3),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "alpha": alpha, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "maximize": maximize})

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the class.

        Args:
            options: Of a group.
        """
        super().check(options)
        check_betas("betas", options["betas"])

    def weights(self, group: Mapping[str, Any]) -> tuple[float, float, float]:
        """Return the weights; powers are averaged.

        Args:
            group: Options.
        """
        beta1, beta2 = group["betas"]
        return beta1, beta2, 1 - beta2
