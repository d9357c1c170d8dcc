r"""MAdam: Adam whose second moment forgets at a rate that each coordinate chooses at each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.shards import local_part
from adadagrad.core.vectors import tensor_norms
from adadagrad.optimizers.base import add_quotients_, buckets, counted, counter, multiply_
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
class MAdam(AbstractMaxVA):
    r"""Adam with maximum-variation averaging: surprise is taken in at once, quiet is remembered for long.

    .. math:: m_t = a m_{t-1} + (1 - a) g_t, \qquad
        x_{t+1} = (1 - \eta \lambda) x_t - \eta \frac{m_t / (1 - a^t)}{\sqrt{\tilde v_t / w_t} + \epsilon}

    with ṽ and w of `AbstractMaxVA`: B_t, the weight of the past in the second moment, is for each coordinate the one in
    [B_lo, B_hi] under which the variance that it has observed comes out largest, in closed form (derived).

    In code: a is `momentum`, eta `lr`, lambda `weight_decay`. A coordinate with a sudden large gradient forgets, and so
    takes a careful step at once; a quiet one averages over 1 / (1 - B_hi) steps. B is never below 1 / (1 + w) >= 1/2
    (derived), so that a B_lo of 1/2 or less changes nothing. With B_lo = B_hi it is Adam.

    State: four tensors of the parameter's size, twice Adam's; one more with `amsgrad`. For noisy problems; where noise
    is small it is Adam at a higher price.

    Args:
        params: Parameters, named parameters or groups; a group may set every option for itself.
        lr: eta, >= 0.
        momentum: a, in [0, 1).
        beta_range: B_lo and B_hi, both in [0, 1).
        eps: > 0 [grad], beside the root of ṽ / w.
        weight_decay: lambda, >= 0.
        decoupled: Whether the decay shrinks the parameter, or (L2) is added to the gradient.
        amsgrad: Divide by the largest root so far.
        nesterov: Take a m_t + (1 - a) g_t over 1 - a^(t+1) for the direction.
        moment_warmup: Steps that only collect statistics, >= 0.
        trust_ratio: Scale each tensor's step by its norm over the norm of the direction, as LAMB does; where
            `weight_decay` is above 0.
        maximize: Ascend instead.
        capturable: Keep the count of steps on the device, so that nothing is read back, for CUDA graphs; not with
            `moment_warmup`.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter is complex.

    Source: Zhu, Cheng, Gan, Sun, Goldstein, Liu (2021), "MaxVA", arXiv 2006.11918, and its code zhuchen03/MaxVA
        (verified; the paper's text was not readable). The closed form of B is derived.
    Differs from the paper: eps stands beside the root of ṽ / w, as in the code. From the code: s² is clamped at 0
        (there it may fall below by rounding); 0/0 alone gives B_lo (there everything below 1e-16); parameters without
        gradient are skipped (there an error); the correction 1 - a^(t+1) under `nesterov` is ours.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = MAdam([x], lr=0.1)
        >>> x.grad = torch.tensor([1.0, -5.0])
        >>> optimizer.step()  # the first step has the length of lr in each coordinate, as Adam's
        >>> x.detach()
        tensor([ 0.9000, -1.9000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        beta_range: tuple[float, float] = (0.5, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        amsgrad: bool = False,
        nesterov: bool = False,
        moment_warmup: int = 0,
        trust_ratio: bool = False,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, options)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the class.

        Args:
            options: Of a group.

        Raises:
            InvalidArgument: One is.
        """
        check_maxva(options)
        check_integer(0, moment_warmup=options["moment_warmup"])
        if options["capturable"] and options["moment_warmup"]:
            raise InvalidArgument("moment_warmup reads the count of steps, which capturable=True leaves on the device")

    def advance(self, group: dict[str, Any], params: list[Tensor], *, first: bool) -> None:
        """Do a step of some parameters of a group.

        Args:
            group: Their group.
            params: Those that have a gradient.
            first: Whether it is the first of all of them.
        """
        capturable, a, lr, decay = group["capturable"], group["momentum"], group["lr"], group["weight_decay"]
        states = [self._state(group, param) for param in params]
        steps = counted([state["step"] for state in states], capturable=capturable)
        names = ["grad_avg", "grad_avg_sq", "weight", "exp_avg", *(["max_denominator"] if group["amsgrad"] else [])]
        grads = [param.grad for param in params if param.grad is not None]
        lists = [params, grads, *([state[name] for state in states] for name in names)]
        whole = group["trust_ratio"] and decay > 0
        if whole:
            lists.append([zeros_for(param) for param in params])
        biases = [1 - a ** (step + group["nesterov"]) for step in steps]
        waiting = [0.0 if not capturable and step <= group["moment_warmup"] else 1.0 for step in steps]
        for (xs, gs, us, vs, ws, ms, *more), (bias, moving) in buckets(lists, [biases, waiting]):
            grads = wide(gs, maximize=group["maximize"])
            if decay != 0 and not group["decoupled"]:
                grads = list(torch._foreach_add(grads, xs, alpha=decay))
            remember(us, vs, ws, grads, weights_of_new(us, vs, ws, grads, group["beta_range"], first=first))
            torch._foreach_lerp_(ms, grads, 1 - a)
            ahead = list(torch._foreach_lerp(ms, grads, 1 - a)) if group["nesterov"] else ms
            roots = denominators(vs, ws, more[0] if group["amsgrad"] else None, group["eps"])
            if whole:
                torch._foreach_mul_(roots, bias)
                torch._foreach_copy_(more[-1], torch._foreach_mul(torch._foreach_div(ahead, roots), moving))
                continue
            if decay != 0 and group["decoupled"]:
                multiply_(xs, [1 - lr * decay * some for some in moving])
            add_quotients_(xs, ahead, roots, [-lr * some / each for some, each in zip(moving, bias, strict=True)])
        if whole:
            self._apply_with_trust(group, params, lists[-1], waiting)

    def _apply_with_trust(
        self, group: Mapping[str, Any], params: list[Tensor], directions: list[Tensor], moving: list[float]
    ) -> None:
        """Scale the step of each tensor to its norm; the decay is part of the direction, as in LAMB."""
        own, steps = [local_part(p) for p in params], [local_part(d) for d in directions]
        if group["decoupled"]:
            torch._foreach_add_(steps, torch._foreach_mul(torch._foreach_mul(own, moving), group["weight_decay"]))
        lengths, sizes = tensor_norms(steps, params), tensor_norms(own, params)
        ratios = torch.where((lengths > 0) & (sizes > 0), sizes / lengths, torch.ones_like(sizes))
        torch._foreach_mul_(steps, list((-group["lr"] * ratios).unbind()))
        torch._foreach_add_(own, steps)

    def _state(self, group: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            state["step"] = counter(param, capturable=group["capturable"])
            for name in ("grad_avg", "grad_avg_sq", "weight", "exp_avg"):
                state[name] = zeros_for(param)
        if group["amsgrad"] and "max_denominator" not in state:
            state["max_denominator"] = zeros_for(param)
        return state
