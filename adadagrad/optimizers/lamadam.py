r"""LaMAdam: LaProp whose second moment forgets at a rate that each coordinate chooses at each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from adadagrad.optimizers.base import add_quotients_, buckets, counter, multiply_
from adadagrad.optimizers.maxva import (
    AbstractMaxVA,
    check_maxva,
    denominators,
    remember,
    weights_of_new,
    wide,
    zeros_for,
)


@final
class LaMAdam(AbstractMaxVA):
    r"""Normalise each gradient by maximum-variation averaging, then average what is normalised.

    .. math:: q_t = a q_{t-1} + (1 - a) \eta_t \frac{g_t}{\sqrt{\tilde v_t / w_t} + \epsilon}, \quad
        l_t = a l_{t-1} + (1 - a) \eta_t, \quad x_{t+1} = (1 - \eta_t \lambda) x_t - \frac{\eta_t}{l_t} q_t

    with ṽ and w of `AbstractMaxVA`. In code: a is `momentum`, q ``exp_avg``, l ``lr_avg``, a scalar. A step moves by
    eta_t times the mean of normalised gradients, weighted by the learning rates at which they came; with a constant
    rate that is eta / (1 - a^t) times the average. Beside `MAdam` a gradient is divided by the moment of its own time,
    not by a later one.

    State: four tensors of the parameter's size, twice Adam's, and a scalar; one more tensor with `amsgrad`. With
    B_lo = B_hi it is LaProp. A B_lo of 1/2 or less changes nothing.

    Args:
        params: Parameters, named parameters or groups; a group may set every option for itself.
        lr: eta, >= 0. There is no default: none is known from the source. The published runs have 1.5e-3 to 3.5e-2.
        momentum: a, in [0, 1).
        beta_range: B_lo and B_hi, both in [0, 1).
        eps: > 0 [grad], beside the root of ṽ / w.
        weight_decay: lambda, >= 0.
        decoupled: Whether the decay shrinks the parameter, or (L2) is added to the gradient.
        amsgrad: Divide by the largest root so far.
        maximize: Ascend instead.
        capturable: Keep l on the device, so that nothing is read back, for CUDA graphs.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter is complex.

    Source: Zhu, Cheng, Gan, Sun, Goldstein, Liu (2021), "MaxVA", arXiv 2006.11918, and its code zhuchen03/MaxVA
        (verified; the paper's text was not readable). The closed form of B is derived.
    Differs from the paper: eps stands beside the root of ṽ / w, as in the code. From the code: `amsgrad` is read (there
        the image code leaves it off whatever is asked); a learning rate of 0 at the first steps does not divide by 0 (l
        = 0 makes no step); s² is clamped at 0; 0/0 alone gives B_lo (there everything below 1e-16).

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = LaMAdam([x], lr=0.1)
        >>> x.grad = torch.tensor([1.0, -5.0])
        >>> optimizer.step()
        >>> x.detach()
        tensor([ 0.9000, -1.9000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.9,
        beta_range: tuple[float, float] = (0.5, 0.98),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, options)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the class.

        Args:
            options: Of a group.
        """
        check_maxva(options)

    def advance(self, group: dict[str, Any], params: list[Tensor], *, first: bool) -> None:
        """Do a step of some parameters of a group.

        Args:
            group: Their group.
            params: Those that have a gradient.
            first: Whether it is the first of all of them.
        """
        a, lr, decay = group["momentum"], group["lr"], group["weight_decay"]
        states = [self._state(group, param) for param in params]
        names = ["grad_avg", "grad_avg_sq", "weight", "exp_avg", *(["max_denominator"] if group["amsgrad"] else [])]
        grads = [param.grad for param in params if param.grad is not None]
        lists = [params, grads, *([state[name] for state in states] for name in names)]
        for (xs, gs, us, vs, ws, qs, *more), (factors,) in buckets(lists, [self._factors(group, states)]):
            grads = wide(gs, maximize=group["maximize"])
            if decay != 0 and not group["decoupled"]:
                grads = list(torch._foreach_add(grads, xs, alpha=decay))
            remember(us, vs, ws, grads, weights_of_new(us, vs, ws, grads, group["beta_range"], first=first))
            roots = denominators(vs, ws, more[0] if group["amsgrad"] else None, group["eps"])
            torch._foreach_mul_(qs, a)
            add_quotients_(qs, grads, roots, [(1 - a) * lr] * len(qs))
            if decay != 0 and group["decoupled"]:
                multiply_(xs, 1 - lr * decay)
            if all(isinstance(factor, float) and factor == factors[0] for factor in factors):  # as most are: one pass
                torch._foreach_add_(xs, qs, alpha=factors[0])
            else:
                torch._foreach_add_(xs, torch._foreach_mul(qs, factors))

    def _factors(self, group: Mapping[str, Any], states: list[dict[str, Any]]) -> list[Any]:
        """Let l take in the learning rate, and return -eta / l for each parameter; 0 where l is 0."""
        a, lr = group["momentum"], group["lr"]
        averages = [state["lr_avg"] for state in states]
        torch._foreach_mul_(averages, a)
        torch._foreach_add_(averages, (1 - a) * lr)
        if group["capturable"] or torch.compiler.is_compiling():
            return [torch.where(average > 0, -lr / average, torch.zeros_like(average)) for average in averages]
        values = [average.item() for average in averages]
        return [-lr / value if value > 0 else 0.0 for value in values]

    def _state(self, group: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if "lr_avg" not in state:
            state["lr_avg"] = counter(param, capturable=group["capturable"]).double()
            for name in ("grad_avg", "grad_avg_sq", "weight", "exp_avg"):
                state[name] = zeros_for(param)
        if group["amsgrad"] and "max_denominator" not in state:
            state["max_denominator"] = zeros_for(param)
        return state
