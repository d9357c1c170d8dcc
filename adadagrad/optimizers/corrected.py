r"""What MARS and MARS-M share: the corrected gradient, at one point or at two, and AdamW for what it does not train.

.. math:: c_t = g_t + k (g_t - h_t), \quad k = \gamma \frac{\beta_1}{1 - \beta_1}, \qquad
    \tilde c_t = \frac{c_t}{\max(1, \|c_t\|)}

g_t is the gradient of this step's batch. h_t is the gradient of the same batch at the parameters before the last step
("exact"), or the last step's gradient g_{t-1} ("approximate").
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adadagrad.core.checks import check_at_least, check_below_one, check_betas, check_choice, check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.shards import is_sharded, local_part, place_of
from adadagrad.core.vectors import tensor_norms
from adadagrad.optimizers.base import (
    AbstractOptimizer,
    Numbers,
    add_quotients_,
    as_number,
    buckets,
    counted,
    counter,
    multiply_,
)
from adadagrad.optimizers.two_points import RandomStates, gradients_there

LARGE_GAMMA = 0.1
"""Above it the approximate mode is noisier than no correction at all."""


class AbstractCorrected(AbstractOptimizer):
    """An optimizer whose momentum is fed corrected gradients; subclasses say what becomes of them."""

    _before: dict[Tensor, Tensor | None]
    """Gradients of the present batch at the parameters before the last step, while an exact step is in progress."""

    @abc.abstractmethod
    def rule(self, group: Mapping[str, Any], param: Tensor) -> str:
        """Return what moves a parameter.

        Args:
            group: Its group.
            param: The parameter.

        Returns:
            ``"adamw"``, ``"lion"`` or ``"orthogonal"`` on corrected gradients; ``"plain"`` is AdamW without correction.
        """

    @abc.abstractmethod
    def direction(self, group: Mapping[str, Any], moment: Tensor) -> Tensor:
        """Turn the whole momentum of a matrix into a direction, under the rule ``"orthogonal"``.

        Args:
            group: The group.
            moment: (r, c) matrix.

        Returns:
            (r, c) matrix, which the learning rate multiplies.
        """

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the classes.

        Args:
            options: Of a group.

        Raises:
            InvalidArgument: One is, or `mode` is not that of the other groups.
        """
        check_at_least(0, lr=as_number(options["lr"]), weight_decay=options["weight_decay"], gamma=options["gamma"])
        check_positive(eps=options["eps"])
        check_betas("betas_1d", options["betas_1d"])
        if "beta" in options:
            check_below_one(beta=options["beta"])
        else:
            check_betas("betas", options["betas"])
        if options["lr_1d"] is not None:
            check_positive(lr_1d=options["lr_1d"], lr=as_number(options["lr"]))
        if options["weight_decay_1d"] is not None:
            check_at_least(0, weight_decay_1d=options["weight_decay_1d"])
        check_choice("mode", options["mode"], ("approximate", "exact"))
        check_choice("first_step", options["first_step"], ("code", "paper"))
        if self.param_groups and options["mode"] != self.param_groups[0]["mode"]:
            raise InvalidArgument(
                f"mode must be the same for all groups, got {options['mode']!r} beside "
                f"{self.param_groups[0]['mode']!r}: a batch is evaluated at earlier values of all parameters or of none"
            )
        if options["mode"] == "approximate" and options["gamma"] > LARGE_GAMMA:
            warnings.warn(
                f"gamma={options['gamma']} in approximate mode adds more noise than it takes away: use at most "
                f'{LARGE_GAMMA}, or mode="exact"',
                stacklevel=5,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its learning rate now is the one that `lr_1d` is set against.

        Args:
            param_group: ``params`` and any options that differ from the defaults.
        """
        super().add_param_group(param_group)
        self.param_groups[-1]["first_lr"] = float(self.param_groups[-1]["lr"])

    def summary(self) -> list[dict[str, Any]]:
        """Return how each parameter is trained.

        Returns:
            For each its ``name`` (or number), ``shape``, ``rule`` (``"plain"`` is AdamW without correction), and the
            ``lr`` and ``weight_decay`` of the moment.
        """
        names, rows = iter(self.named()), []
        for group in self.param_groups:
            for param in group["params"]:
                rule = self.rule(group, param)
                lr, decay, _ = self._settings(group, rule)
                found = {"name": next(names)[0], "shape": tuple(param.shape), "rule": rule}
                rows.append({**found, "lr": lr, "weight_decay": decay})
        return rows

    @property
    def needs_closure(self) -> bool:
        """Whether a step evaluates the batch a second time."""
        return bool(self.param_groups[0]["mode"] == "exact")

    def evaluate(self, closure: Callable[[], float] | None) -> float | None:
        """Evaluate the closure at the present parameters, and in exact mode once more at the earlier ones.

        Args:
            closure: Computes the loss and its gradients; called twice in exact mode, with the same random numbers.

        Returns:
            The loss at the present parameters.

        Raises:
            InvalidArgument: There is no closure in exact mode, or a gradient is sparse.
        """
        self._before = {}
        if not self.needs_closure:
            return super().evaluate(closure)
        if closure is None:
            raise InvalidArgument(
                'mode="exact" evaluates the batch at two places: call step(closure), use AdaptiveBatch(replay=True), '
                'or mode="approximate"'
            )
        params = [param for group in self.param_groups for param in group["params"]]
        random = RandomStates([param.device for param in params])
        loss = super().evaluate(closure)
        earlier = [param for param in params if "previous_param" in self.state[param]]
        if earlier:
            # All of them: the closure overwrites the gradients of those that have just been added, too.
            values = [self.state[param].get("previous_param", param) for param in params]
            there = dict(zip(params, gradients_there(closure, params, values, random), strict=True))
            self._before = {param: there[param] for param in earlier if param.grad is not None}
        with torch.no_grad():
            for param in params:
                if "previous_param" not in self.state[param]:
                    self.state[param]["previous_param"] = param.detach().clone()
                else:
                    self.state[param]["previous_param"].copy_(param)
        return loss

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move some parameters of a group.

        Args:
            group: Their group.
            params: Those that have a gradient.
        """
        rules: dict[str, list[Tensor]] = {}
        for param in params:
            rules.setdefault(self.rule(group, param), []).append(param)
        for rule, some in rules.items():
            self._move(group, rule, some)
        for param in params:
            self._before.pop(param, None)

    def _move(self, group: dict[str, Any], rule: str, params: list[Tensor]) -> None:
        """Do a step by one rule: what enters the moments, the moments, the direction, the parameters."""
        adam, clipped = rule in ("plain", "adamw"), rule != "plain" and group["clip"]
        lr, decay, betas = self._settings(group, rule)
        grads = [param.grad for param in params if param.grad is not None]
        if group["maximize"]:
            grads = list(torch._foreach_neg([local_part(grad) for grad in grads]))
        states = [self._state(group, rule, param, grad) for param, grad in zip(params, grads, strict=True)]
        steps = counted([state["step"] for state in states], capturable=group["capturable"])
        directions, scales = self._corrected(group, rule, params, grads, states)
        lists = [params, grads, directions, [state["exp_avg"] for state in states]]
        lists += [[state["exp_avg_sq"] for state in states]] if adam else []
        lists += [[state["previous_grad"] for state in states]] if "previous_grad" in states[0] else []
        firsts, seconds = [1 - betas[0] ** step for step in steps], [(1 - betas[1] ** step) ** 0.5 for step in steps]
        whole = group["cautious"] or rule == "orthogonal"  # the direction must be known before anything moves
        for (xs, gs, ds, ms, *more), (factors, bias1, bias2) in buckets(lists, [scales, firsts, seconds]):
            if self._is_short(group, rule):  # m_t = b' M_{t-1} + (1 - b') g_t, with M the plain average
                torch._foreach_copy_(ds, torch._foreach_lerp(ms, gs, 1 - betas[0] * (1 - group["gamma"])))
                torch._foreach_lerp_(ms, gs, 1 - betas[0])
            else:
                if clipped:
                    multiply_(ds, factors)
                torch._foreach_lerp_(ms, ds, 1 - betas[0])
                if adam:
                    multiply_(more[0], betas[1])
                    torch._foreach_addcmul_(more[0], ds, ds, 1 - betas[1])
                if len(more) > adam:
                    torch._foreach_copy_(more[-1], gs)
                if not adam or whole:
                    torch._foreach_copy_(ds, ms)
            if adam:
                roots = torch._foreach_sqrt(more[0])
                torch._foreach_div_(roots, bias2)
                torch._foreach_add_(roots, group["eps"])
                if not whole:
                    if decay != 0:
                        multiply_(xs, 1 - lr * decay)
                    add_quotients_(xs, ms, roots, [-lr / bias for bias in bias1])
                    continue
                torch._foreach_div_(ds, roots)
                torch._foreach_div_(ds, bias1)
            elif rule == "lion":
                torch._foreach_sign_(ds)
            if not whole:
                _apply(xs, ds, lr, decay)
        if whole:
            self._apply_whole(group, rule, params, grads, directions, lr, decay)

    def _apply_whole(
        self,
        group: Mapping[str, Any],
        rule: str,
        params: list[Tensor],
        grads: list[Tensor],
        directions: list[Tensor],
        lr: float,
        decay: float,
    ) -> None:
        """Move parameters by directions that are only known for whole tensors."""
        for param, grad, direction in zip(params, grads, directions, strict=True):
            if rule == "orthogonal":
                direction.copy_(self._orthogonal(group, param, direction))
            if group["cautious"] and rule != "plain":
                keep = (direction * local_part(grad) > 0).to(direction.dtype)
                count = place_of(param).add_(keep.sum(dtype=torch.float64))
                direction.mul_(keep).div_((count / param.numel()).clamp(min=1e-3))
            _apply([local_part(param)], [direction], lr, decay)

    def _orthogonal(self, group: Mapping[str, Any], param: Tensor, moment: Tensor) -> Tensor:
        """Return this rank's part of the direction of a matrix, of which every rank may hold some rows."""
        if not is_sharded(param):
            return self.direction(group, moment)
        from torch.distributed.tensor import DTensor, distribute_tensor

        placed: Any = param
        whole: Any = DTensor.from_local(
            moment, placed.device_mesh, placed.placements, shape=param.shape, stride=param.stride()
        )
        found = self.direction(group, whole.full_tensor())
        return distribute_tensor(found, placed.device_mesh, placed.placements, src_data_rank=None).to_local()

    def _settings(self, group: Mapping[str, Any], rule: str) -> tuple[float, float, tuple[float, float]]:
        """Return learning rate, decay and betas of a rule."""
        if rule != "plain":
            return group["lr"], group["weight_decay"], (_momentum(group), group.get("betas", (0, 0))[1])
        ratio = 1.0 if group["lr_1d"] is None else group["lr_1d"] / group["first_lr"]
        decay = group["weight_decay"] if group["weight_decay_1d"] is None else group["weight_decay_1d"]
        return group["lr"] * ratio, decay, group["betas_1d"]

    def _state(self, group: Mapping[str, Any], rule: str, param: Tensor, grad: Tensor) -> dict[str, Any]:
        """Return a parameter's state, made at its first step."""
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            state["step"] = counter(param, capturable=group["capturable"])
            state["exp_avg"] = torch.zeros_like(param)
            if rule in ("plain", "adamw"):
                state["exp_avg_sq"] = torch.zeros_like(param)
            if rule != "plain" and group["mode"] == "approximate" and not self._is_short(group, rule):
                state["previous_grad"] = torch.zeros_like(param)
                if group["first_step"] == "paper":
                    local_part(state["previous_grad"]).copy_(local_part(grad))
        return state

    def _corrected(
        self,
        group: Mapping[str, Any],
        rule: str,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
    ) -> tuple[list[Tensor], Numbers]:
        """Return c in new tensors, and the factors that shorten each to norm 1."""
        momentum, own = _momentum(group), [local_part(grad) for grad in grads]
        ones = [1.0] * len(own)
        if self._is_short(group, rule):
            return [torch.empty_like(grad) for grad in own], ones
        if rule == "plain":
            return [grad.clone() for grad in own], ones
        if group["mode"] == "approximate":
            others = [local_part(state["previous_grad"]) for state in states]
        else:
            others = [self._other(group, param, grad) for param, grad in zip(params, own, strict=True)]
        found = list(torch._foreach_lerp(others, own, 1 + group["gamma"] * momentum / (1 - momentum)))
        if not group["clip"]:
            return found, ones
        factors: list[Any] = ones
        for device in dict.fromkeys(tensor.device for tensor in found):  # usually one; a group may span devices
            here = [i for i, tensor in enumerate(found) if tensor.device == device]
            some = tensor_norms([found[i] for i in here], [params[i] for i in here]).clamp(min=1).reciprocal()
            host = device.type == "cpu" and not torch.compiler.is_compiling()
            for i, value in zip(here, some.tolist() if host else some.unbind(), strict=True):
                factors[i] = value
        return found, factors

    def _other(self, group: Mapping[str, Any], param: Tensor, grad: Tensor) -> Tensor:
        """Return this rank's part of h; at the first step 0 as in the published code, or g as in the paper."""
        if param not in self._before:
            return torch.zeros_like(grad) if group["first_step"] == "code" else grad
        found = self._before[param]
        if found is None:
            return grad
        return -local_part(found) if group["maximize"] else local_part(found)

    def _is_short(self, group: Mapping[str, Any], rule: str) -> bool:
        """Return whether the momentum has a closed form that needs no previous gradient: nothing is clipped."""
        return (
            rule in ("lion", "orthogonal")
            and group["mode"] == "approximate"
            and not group["clip"]
            and group["first_step"] == "code"
        )


def _apply(params: list[Tensor], directions: list[Tensor], lr: float, decay: float) -> None:
    """Let x <- x - lr (direction + decay x); changes the directions."""
    if decay != 0:
        multiply_(params, 1 - lr * decay)
    multiply_(directions, -lr)
    torch._foreach_add_(params, directions)


def _momentum(group: Mapping[str, Any]) -> float:
    """Return the weight of the past in the momentum of corrected gradients."""
    return float(group["beta"] if "beta" in group else group["betas"][0])
