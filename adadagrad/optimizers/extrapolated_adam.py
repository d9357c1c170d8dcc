r"""Extrapolated Adam: AdamW on gradients at points displaced along the last step's direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor

from adadagrad.core.checks import check_at_least, check_betas, check_choice, check_integer, check_positive
from adadagrad.optimizers.base import as_number, buckets, counted, counter, multiply_
from adadagrad.optimizers.extrapolation import AbstractExtrapolated
from adadagrad.optimizers.extrapolation_noise import TIMES, Kept

DIRECTIONS = ("precond", "grad")


@final
class ExtrapolatedAdam(AbstractExtrapolated):
    r"""AdamW whose gradient is taken at a point displaced along the direction of the last step.

    .. math:: z_t = w_{t-1} - \hat\gamma d_{t-1}, \quad g_t = \nabla f(z_t), \quad
        w_t = (1 - \gamma \lambda) w_{t-1} - \gamma \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

    with m and v the averages of g and g² as in Adam, and d the preconditioned direction
    m̂ / (sqrt(v̂) + eps) (``"precond"``), or the worker's own last gradient (``"grad"``).

    In code: gamma is `lr`, gamma-hat is ``extrapolation * lr``, lambda is `weight_decay`. The forward and the backward
    of a step run inside ``with optimizer.extrapolated():``; `step` comes after it. With ``"precond"`` d is the same on
    all ranks, needs no memory and has the length of an Adam step; it carries the smooth part of the noise only. With
    ``"grad"`` all that is said of workers, wrappers and checkpoints in `ExtrapolatedSGD` holds here, and
    `extrapolation` has another scale: it multiplies raw gradients.

    With ``extrapolation=0`` it is torch's AdamW. State, in tensors of the parameter's size: m, v, and for ``"grad"``
    the last gradient, K of them for K simulated workers. In the context a copy of w beside it.

    Args:
        params: Parameters, named parameters or groups; a group may set every option for itself, but for `workers`.
        lr: gamma, >= 0.
        betas: Weights of the past in m and v, in [0, 1).
        eps: > 0, beside the root of v [grad].
        weight_decay: lambda, >= 0, decoupled; no part of d.
        extrapolation: c = gamma-hat / gamma, >= 0, dimensionless for ``"precond"``, 1/grad for ``"grad"``. To be tuned.
        direction: ``"precond"`` or ``"grad"``. A sharded model never forms local gradients, and takes the first.
        workers: K, simulated in one process. Without effect on ``"precond"``.
        maximize: Ascend instead, and displace so.

    Raises:
        InvalidArgument: An option is out of its range, a parameter is complex, or sharded for ``"grad"``.

    Source: Lin, Kong, Stich, Jaggi (2020), "Extrapolation for large-batch training in deep learning", arXiv 2006.05720,
        whose experiments have an Adam variant (from memory, unverified (low)).
    Differs from the paper: not checked. Which direction the paper displaces along is not known to us; both are offered.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = ExtrapolatedAdam([x], lr=0.25)
        >>> for _ in range(2):
        ...     with optimizer.extrapolated():
        ...         x.square().sum().mul(0.5).backward()  # the gradient is the point itself: 1, then 0.75 - 0.25 * 1
        ...         print(round(x.item(), 3))
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        1.0
        0.5
    """

    local_option = "direction='grad'"
    local_remedy = "direction='precond'"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        extrapolation: float = 1.0,
        *,
        direction: Literal["precond", "grad"] = "precond",
        workers: int = 1,
        maximize: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, options)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the class.

        Args:
            options: Of a group.
        """
        check_at_least(
            0, lr=as_number(options["lr"]), extrapolation=options["extrapolation"], weight_decay=options["weight_decay"]
        )
        check_betas("betas", options["betas"])
        check_positive(eps=options["eps"])
        check_choice("direction", options["direction"], DIRECTIONS)
        check_integer(1, workers=options["workers"])

    def keeps_local(self, group: Mapping[str, Any]) -> bool:
        """Return whether a group is displaced along each worker's own last gradient.

        Args:
            group: The group.

        Returns:
            Whether it is.
        """
        return bool(group["direction"] == "grad")

    def displaces(self, group: Mapping[str, Any]) -> bool:
        """Return whether z may differ from w in a group.

        Args:
            group: The group.

        Returns:
            Whether it may.
        """
        return bool(group["extrapolation"] != 0)

    def displace(self, group: Mapping[str, Any], first: int, worker: int, kept: Kept) -> None:
        """Subtract gamma-hat d from the parameters; see `AbstractExtrapolated.displace`.

        Args:
            group: The group.
            first: Not used.
            worker: Which simulated worker.
            kept: Is given every tensor before it is changed.
        """
        length = group["extrapolation"] * float(group["lr"])
        params = [param for param in group["params"] if param in self.state and "step" in self.state[param]]
        if length == 0 or not params:
            return
        if group["direction"] == "precond":
            counts = [self.state[param]["step"].item() for param in params]
            self._add_directions(group, params, counts, -length, kept)
            return
        pairs = [(param, past) for param in params if (past := self.local_gradient(param, worker)) is not None]
        for (parts, gradients), _ in buckets(list(zip(*pairs, strict=True)) or [[], []], times=TIMES):
            kept.keep(parts)
            torch._foreach_add_(parts, gradients, alpha=length if group["maximize"] else -length)

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Do a step of AdamW.

        Args:
            group: Their group.
            params: Those that have a gradient.
        """
        for param in params:
            state = self.state[param]
            if "step" not in state:
                state["step"] = counter(param, capturable=False)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        counts = counted([self.state[param]["step"] for param in params], capturable=False)
        self._add_directions(group, params, counts, -float(group["lr"]), None)
        self.remember_local(group, params)

    def _add_directions(
        self, group: Mapping[str, Any], params: list[Tensor], counts: Any, factor: float, kept: Kept | None
    ) -> None:
        """Add a multiple of m̂ / (sqrt(v̂) + eps); first let m and v take in the gradients, unless a copy is kept."""
        first, second = group["betas"]
        lists = [params, *([self.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq"))]
        if kept is None:
            lists.append([param.grad for param in params if param.grad is not None])
        factors = [factor / (1 - first**count) for count in counts]
        roots = [(1 - second**count) ** 0.5 for count in counts]
        decay = 1 - float(group["lr"]) * group["weight_decay"]
        for (parts, averages, squares, *grads), (steps, corrections) in buckets(lists, [factors, roots], times=TIMES):
            if kept is not None:
                kept.keep(parts)
            else:
                gradients = torch._foreach_neg(grads[0]) if group["maximize"] else grads[0]
                if decay != 1:
                    multiply_(parts, decay)
                torch._foreach_lerp_(averages, gradients, 1 - first)
                multiply_(squares, second)
                torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
            denominators = torch._foreach_sqrt(squares)
            torch._foreach_div_(denominators, corrections)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_addcdiv_(parts, averages, denominators, steps)
