r"""Extrapolated SGD: gradients at points displaced along each worker's own last gradient, or by noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor

from adadagrad.core.checks import check_at_least, check_below_one, check_choice, check_integer
from adadagrad.core.comm import all_ranks
from adadagrad.core.mixing import seed_for
from adadagrad.core.shards import local_part
from adadagrad.optimizers.base import as_number, buckets, multiply_
from adadagrad.optimizers.extrapolation import AbstractExtrapolated
from adadagrad.optimizers.extrapolation_noise import (
    FILTER_NORMS,
    TIMES,
    FilterNorm,
    Kept,
    check_whole_filters,
    gaussian,
    scale_by_filters_,
)

PERTURB = ("past_local", "past_global", "isotropic", "filter")


@final
class ExtrapolatedSGD(AbstractExtrapolated):
    r"""SGD with momentum, whose gradient on each worker is taken at a point displaced by that worker's last one.

    .. math:: z_t^k = w_{t-1} + u v_{t-1} + \zeta_t^k, \quad g_t^k = \nabla f_k(z_t^k), \quad
        v_t = u v_{t-1} - \gamma \frac1K \sum_k g_t^k, \quad w_t = w_{t-1} + v_t

    .. math:: \zeta_t^k = -\hat\gamma g_{t-1}^k \ (past\ local), \quad -\hat\gamma \tfrac1K \sum_j g_{t-1}^j \
        (past\ global), \quad \hat\gamma \xi \ (isotropic), \quad \hat\gamma s(w) \xi \ (filter)

    In code: gamma is `lr`, gamma-hat is ``extrapolation * lr``, u is `momentum`, xi ~ N(0, I) anew for each rank,
    worker and step, s(w) the size of the filter that an entry belongs to. The forward and the backward of a step run
    inside ``with optimizer.extrapolated():``; `step` comes after it, and refuses gradients that were taken elsewhere.

    What it is for: very large batches. A worker's gradient carries the noise of its own small batch, and displaces by
    it, which smooths the loss, at no further backward and no communication. Averaged over K workers that noise is gone
    (``"past_global"``, for comparison). Growing the local batch weakens the smoothing, adding workers does not. Noise
    scaled by filters did nearly as well in a small pilot (a planning number, no result). On a quadratic without noise
    the stable region shrinks: gamma L + 2 gamma-hat L < 2 for curvature L and u = 0 (derived and tested), so that a
    quadratic shows it losing.

    The parameters outside the context are w. torch's SGD with ``nesterov=True`` stores w + u v instead, and for
    ``extrapolation=0`` that is equal to rounding, with and without decay, as long as `lr` is constant: v has the
    learning rate inside. The state is therefore called ``velocity``, and is not torch's ``momentum_buffer``.

    Workers are the ranks of a process group. DistributedDataParallel averages during the backward: call
    ``optimizer.keep_local_gradients(model)`` once, or else every rank remembers the average. Where you average `.grad`
    yourself, do it after the context. In one process K workers are simulated by K micro-batches, each in a context
    ``extrapolated(worker=k)`` with its loss divided by K; a worker that is left out has gradient 0. A GradScaler's
    scale must be taken out of the local gradients too: ``optimizer.scale_local_(1 / scale)``.

    State, in tensors of the parameter's size: v (unless u = 0), and the last gradient, K of them for K simulated
    workers (none for noise). In the context a copy of w beside it. ``"past_local"`` state differs between ranks: save
    it on each, and call `forget_local_gradients` for another number of ranks: one step without extrapolation. Noise
    depends on `seed`, the number of the step, rank, worker and parameter alone, and so a repeated step repeats it; each
    rank of a sharded model draws for its own shards, and all see one displacement. Batch normalisation sees each batch
    once, at z.

    Args:
        params: Parameters, named parameters or groups; a group may set every option for itself, but for `workers`.
        lr: gamma, >= 0.
        momentum: u, in [0, 1).
        extrapolation: c = gamma-hat / gamma, >= 0, dimensionless, so that gamma-hat follows schedules of `lr`. 0
            displaces by u v alone. To be tuned: a small pilot preferred 3, at the edge of its grid; for noise c * lr
            is its standard deviation, for ``"filter"`` relative to the filter's entries.
        perturb: ``"past_local"``, ``"past_global"``, ``"isotropic"`` or ``"filter"``. A sharded model never forms local
            gradients, and takes the others.
        nesterov: Take the gradient at w + u v + zeta; else at w + zeta (heavy ball).
        filter_norm: s(w) for ``"filter"``: ``"rms"`` the root of the mean square of the filter, ``"norm"`` its norm,
            ``"match"`` its norm over that of its noise. Filters are slices along the first dimension; a tensor of one
            dimension is one filter.
        weight_decay: lambda, >= 0, coupled: as by torch, lambda times the parameter is added to the gradient in `step`,
            at the point w + u v (w without `nesterov`), not displaced by zeta. The remembered gradient has no decay.
        workers: K, simulated in one process. Without effect on ``"past_global"``.
        seed: Of the noise.
        maximize: Ascend instead, and displace along the gradient.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter is complex or sharded in a way that the
            displacement cannot be formed.

    Source: Lin, Kong, Stich, Jaggi (2020), "Extrapolation for large-batch training in deep learning", arXiv 2006.05720
        (the abstract is verified; the update is from memory and second-hand outlines, unverified (medium)). Noise by
        filters: Wen and others (2018), "SmoothOut".
    Differs from the paper: unknown in details. Our choices: gamma-hat is tied to gamma, the first step is plain, decay
        is no part of the remembered gradient, filters are measured by their root mean square. Stochastic extragradient,
        which needs a second backward, is left out.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = ExtrapolatedSGD([x], lr=0.5, momentum=0.0, extrapolation=2.0)
        >>> for _ in range(2):
        ...     with optimizer.extrapolated():
        ...         x.square().sum().mul(0.5).backward()  # the gradient is the point itself: 1, then 0.5 - 2 * 0.5 * 1
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> x.item()
        0.75
    """

    local_option = "perturb='past_local'"
    local_remedy = "perturb='filter' or 'past_global'"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        extrapolation: float = 1.0,
        *,
        perturb: Literal["past_local", "past_global", "isotropic", "filter"] = "past_local",
        nesterov: bool = True,
        filter_norm: FilterNorm = "rms",
        weight_decay: float = 0.0,
        workers: int = 1,
        seed: int = 0,
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
        check_below_one(momentum=options["momentum"])
        check_choice("perturb", options["perturb"], PERTURB)
        check_choice("filter_norm", options["filter_norm"], FILTER_NORMS)
        check_integer(1, workers=options["workers"])
        check_integer(0, seed=options["seed"])

    def check_placement(self, group: Mapping[str, Any], param: Tensor, place: str) -> None:
        """Refuse a sharded parameter for which the displacement cannot be formed; see the class.

        Args:
            group: Its group.
            param: The parameter.
            place: Which one it is, for the message.
        """
        super().check_placement(group, param, place)
        if group["perturb"] == "filter":
            check_whole_filters(param, place)

    def keeps_local(self, group: Mapping[str, Any]) -> bool:
        """Return whether a group is displaced along each worker's own last gradient.

        Args:
            group: The group.

        Returns:
            Whether it is.
        """
        return bool(group["perturb"] == "past_local")

    def displaces(self, group: Mapping[str, Any]) -> bool:
        """Return whether z may differ from w in a group.

        Args:
            group: The group.

        Returns:
            Whether it may.
        """
        return bool(group["extrapolation"] != 0 or (group["nesterov"] and group["momentum"] != 0))

    def displace(self, group: Mapping[str, Any], first: int, worker: int, kept: Kept) -> None:
        """Add u v + zeta to the parameters; see `AbstractExtrapolated.displace`.

        Args:
            group: The group.
            first: Number of its first parameter among all.
            worker: Which simulated worker.
            kept: Is given every tensor before it is changed.
        """
        ahead = group["momentum"] if group["nesterov"] else 0.0
        length = group["extrapolation"] * float(group["lr"])
        noisy = length != 0 and group["perturb"] in ("isotropic", "filter")
        rank = all_ranks().index if noisy else 0
        columns: dict[tuple[float, ...], list[list[Tensor]]] = {}
        for index, param in enumerate(group["params"]):
            state = self.state.get(param, {})
            terms: list[tuple[float, Tensor]] = []
            if ahead and "velocity" in state:
                terms.append((ahead, state["velocity"]))
            past = None if noisy or length == 0 else self._past(group, param, worker)
            if past is not None:
                terms.append((length if group["maximize"] else -length, past))
            if noisy and param.requires_grad:
                seed = seed_for(group["seed"], group.get("step", 0), rank, worker, first + index)
                self._add_noise(group, param, terms, length, seed, kept)
            elif terms:
                rows = columns.setdefault(tuple(factor for factor, _ in terms), [])
                rows.append([param, *(tensor for _, tensor in terms)])
        for factors, rows in columns.items():
            for (parts, *others), _ in buckets(list(zip(*rows, strict=True)), times=TIMES):
                kept.keep(parts)
                for factor, tensors in zip(factors, others, strict=True):
                    torch._foreach_add_(parts, tensors, alpha=factor)

    def _add_noise(
        self,
        group: Mapping[str, Any],
        param: Tensor,
        terms: list[tuple[float, Tensor]],
        length: float,
        seed: int,
        kept: Kept,
    ) -> None:
        """Displace one parameter by noise, which takes longer to draw than all else."""
        part = local_part(param)
        noise = gaussian(part, seed)
        if group["perturb"] == "filter":
            scale_by_filters_(noise, param, group["filter_norm"])
        kept.keep([part])
        for factor, tensor in terms:
            part.add_(local_part(tensor), alpha=factor)
        part.add_(noise, alpha=length)

    def _past(self, group: Mapping[str, Any], param: Tensor, worker: int) -> Tensor | None:
        if group["perturb"] == "past_local":
            return self.local_gradient(param, worker)
        found: Tensor | None = self.state.get(param, {}).get("past_gradient")
        return found

    @torch.no_grad()
    def move(self) -> None:
        """Update all groups from the gradients that are there, begin a new window, and count it for the noise."""
        super().move()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Let v take in the gradients, and add it to the parameters.

        Args:
            group: Their group.
            params: Those that have a gradient.
        """
        momentum, lr, decay = group["momentum"], float(group["lr"]), group["weight_decay"]
        step = lr if group["maximize"] else -lr
        states = [self.state[param] for param in params]
        lists = [params, [param.grad for param in params if param.grad is not None]]
        if momentum:
            for state, param in zip(states, params, strict=True):
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            lists.append([state["velocity"] for state in states])
        else:
            for state in states:
                state.pop("velocity", None)
        remembers = group["perturb"] == "past_global" and group["extrapolation"] != 0
        for state, param in zip(states, params, strict=True):
            if not remembers:
                state.pop("past_gradient", None)
            elif "past_gradient" not in state:
                state["past_gradient"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if remembers:
            lists.append([state["past_gradient"] for state in states])
        inertia = momentum * (1 - lr * decay) if group["nesterov"] else momentum  # decay at w + u v, or at w
        for (ps, grads, *others), _ in buckets(lists, times=TIMES):
            if remembers:
                torch._foreach_copy_(others[-1], grads)
            if momentum:
                velocities = others[0]
                multiply_(velocities, inertia)
                torch._foreach_add_(velocities, grads, alpha=step)
                if decay:
                    torch._foreach_add_(velocities, ps, alpha=-lr * decay)
                torch._foreach_add_(ps, velocities)
            else:
                if decay:
                    multiply_(ps, 1 - lr * decay)
                torch._foreach_add_(ps, grads, alpha=step)
        self.remember_local(group, params)
