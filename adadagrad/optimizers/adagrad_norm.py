"""AdaGrad-Norm: gradient descent whose step length is divided by the norm of all gradients so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from adadagrad.core.checks import check_at_least, check_positive
from adadagrad.core.vectors import squared_norm
from adadagrad.optimizers.base import AbstractOptimizer, buckets, multiply_


@final
class AdaGradNorm(AbstractOptimizer):
    r"""Descend along the gradient, with one step length for all parameters that adapts to the gradients' norms.

    .. math:: v_k = v_{k-1} + \|g_k\|^2, \qquad x_{k+1} = x_k - \frac{\alpha}{\sqrt{v_k}} g_k

    In code: v is ``group["accumulator"]``, one scalar over all parameters of the group, alpha is `lr`, g_k the
    gradient of the step. The new accumulator, which already holds g_k, divides. There is no epsilon: the positive
    initial value takes its place.

    Use it where the direction of the gradient is to be kept and its scale is not known: the choice of `lr` is more
    forgiving than for SGD, and no bound in terms of the smoothness constant is needed. v never falls, so that one
    huge gradient (a diverging start, a bad batch) slows all later steps. Parameters of very different scale are
    better served by diagonal AdaGrad (`torch.optim.Adagrad`). One number of state for each group; a step reads the
    gradients twice and needs one temporary of the gradients' size. Nothing is copied to the host. Under `fully_shard`
    every rank updates its shards, and the norms are those of the whole gradient: 8 bytes to the other ranks per group.

    The accumulator is a float64 scalar tensor on the device of the group's first parameter. It lives in the group,
    not in ``state``: it belongs to no single parameter, and entries of ``state`` are cast to the parameter's dtype
    when loaded. ``load_state_dict`` replaces all entries of the groups by the saved ones, as torch does, accumulators
    included, bit for bit. As with every torch optimizer, ``state_dict()`` refers to the live tensors: copy it to keep
    it over further steps.

    Args:
        params: Parameters, named parameters or groups; a group may set its own options, and has its own v.
        lr: alpha, >= 0 [parameter units]: the length of the first step where that gradient dominates v.
        initial_accumulator: v_0, > 0 [grad^2]. Larger damps the first steps; it matters until the sum of squared
            norms exceeds it.
        weight_decay: Decoupled decay, >= 0: parameters with a gradient are multiplied by 1 - lr * weight_decay
            before the step, not divided by sqrt(v). Dimension 1/lr.
        maximize: Ascend instead.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter is complex.

    Source: Ward, Wu, Bottou (2019), "AdaGrad stepsizes", arXiv 1806.01811, algorithm 1 (the update is verified in
        a public encyclopedia page; the place of the initial value is from memory, unverified (medium)); used as
        AdAdaGrad-Norm by Lau, Liu, Kolar (2024), "AdAdaGrad", arXiv 2402.11215 (its letters are from memory,
        unverified (medium)). The default of `initial_accumulator` is that of timlautk/AdAdaGrad (verified).
    Differs from the paper: no; decoupled weight decay is added. The released code of AdAdaGrad keeps one value for
        each row or channel, mixes other parameters' norms into those of biases and has no decay at zero gradient.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = AdaGradNorm([x], lr=10.0, initial_accumulator=75.0)
        >>> x.square().sum().mul(0.5).backward()  # the gradient is x, of squared norm 25
        >>> optimizer.step()  # moves by 10 / sqrt(75 + 25) = 1 times the gradient
        >>> x.detach(), optimizer.param_groups[0]["accumulator"].item()
        (tensor([0., 0.]), 100.0)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        initial_accumulator: float = 1e-2,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        options = {"lr": lr, "initial_accumulator": initial_accumulator, "weight_decay": weight_decay}
        super().__init__(params, {**options, "maximize": maximize})

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the class.

        Args:
            options: Of a group.
        """
        check_at_least(0, lr=options["lr"], weight_decay=options["weight_decay"])
        check_positive(initial_accumulator=options["initial_accumulator"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with an accumulator of its own, which starts at its `initial_accumulator`.

        Args:
            param_group: ``params`` and any options that differ from the defaults.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        group["accumulator"] = torch.tensor(group["initial_accumulator"], dtype=torch.float64, device=device)

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move some parameters of a group: v += ||g||^2, x *= 1 - lr * decay, x -= lr / sqrt(v) * g.

        Args:
            group: Their group.
            params: Those that have a gradient.
        """
        grads = [param.grad for param in params if param.grad is not None]
        device = params[0].device
        accumulator = group["accumulator"]
        if accumulator.device != device:  # the model was moved, or the state was loaded from another device
            accumulator = group["accumulator"] = accumulator.to(device)
        for place in {grad.device: None for grad in grads}:  # usually one; a group may span devices
            accumulator += squared_norm([grad for grad in grads if grad.device == place]).to(device)
        lr, decay = group["lr"], group["weight_decay"]
        factor = (lr if group["maximize"] else -lr) * accumulator.rsqrt()
        for (xs, gs), _ in buckets([params, grads]):
            if decay != 0:
                multiply_(xs, 1 - lr * decay)
            torch._foreach_add_(xs, torch._foreach_mul(gs, factor.to(xs[0].device)))
