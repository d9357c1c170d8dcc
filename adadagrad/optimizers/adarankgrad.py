r"""AdaRankGrad: Adam in a subspace of each matrix's gradient, whose rank and moment of change the gradient chooses."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from adadagrad.core.checks import (
    check_at_least,
    check_below_one,
    check_betas,
    check_choice,
    check_fraction,
    check_integer,
    check_positive,
)
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.mixing import seed_for
from adadagrad.core.optimizing import EVERYTHING
from adadagrad.core.shards import is_sharded
from adadagrad.optimizers.base import AbstractOptimizer, buckets, counted, counter
from adadagrad.optimizers.moment_transfer import transfer
from adadagrad.optimizers.range_finder import find_subspace

LOG_LENGTH = 10_000
"""Switches that are remembered, the latest."""


class Switch(NamedTuple):
    """A change of subspace.

    Args:
        step: The parameter's step, from 1.
        parameter: Its name, or its number.
        old_rank: Rank before; 0 at the first.
        new_rank: Rank after.
        reason: ``"first"``, ``"tolerance"`` (the projected gradient has fallen) or ``"cap"`` (steps are up).
    """

    step: int
    parameter: str
    old_rank: int
    new_rank: int
    reason: str


@final
class AdaRankGrad(AbstractOptimizer):
    r"""Keep Adam's moments of each matrix in the few directions that its gradient has, as many as it takes.

    .. math:: \hat G = Q^\top G, \qquad W \leftarrow W - \eta \, \alpha \, Q \, \text{Adam}(\hat G) - \eta \lambda W

    Q, (m, r) with orthonormal columns, spans most of the gradient of an (m, n) matrix with m <= n (mirrored otherwise):
    the smallest r that misses no more than a share `max_residual_energy` of its squared norm. It is kept until the
    projected gradient has fallen to a share of what it was, or for `max_inner_steps`, and then found anew; the moments
    are carried over by R = Q_new^T Q_old,

    .. math:: M \leftarrow R M, \qquad V \leftarrow (R \circ R) V

    In code: Q is ``basis``, eta `lr`, alpha `scale`. The rank never grows where `monotone_rank` holds, and the state
    tensors are made anew in the smaller size. At full rank Q is the identity, and this is Adam.

    State of a matrix: m r + 2 n r numbers, where Adam has 2 m n; both bases during a switch. A step multiplies the
    gradient by Q twice; a switch costs a QR and a small SVD. For large matrices whose gradient has low rank; the rank
    of small layers gains nothing. Matrices must be whole on each rank: `fully_shard` is refused. Random numbers are
    drawn anew from (seed, parameter, step), so that no state of a generator need be saved.

    A gradient of zeros or not finite, or a decomposition that does not converge, leaves the subspace as it is (at the
    first step: `min_rank` of the axes), and the next gradient is tried; the moments take in any gradient, so that NaN
    must be kept from them, as the engine does. Under `LocalSGD` the ranks' subspaces differ: ``"local"`` state.

    What to watch: gradients of few examples have a low rank (a linear layer's, at most that of its inputs), which
    `monotone_rank` then keeps for good; where the batch grows, set it False or `min_rank` higher. And directions that a
    switch brings in begin with empty moments late in the bias correction, so that their first updates are up to 6.6
    times as long as at rest, for the default betas (derived).

    Args:
        params: Parameters, named parameters or groups; a group may set every option for itself.
        lr: eta, >= 0.
        betas: Weights of the past in the moments; the first alone is the momentum of ``rule="momentum"``.
        eps: > 0, beside the root of the second moment.
        weight_decay: lambda, >= 0, decoupled.
        max_rank: Largest rank; None trains the group by plain Adam, as parameters that are no matrices always are.
        min_rank: Smallest rank, >= 1.
        max_residual_energy: Share of the squared norm of the gradient that the subspace may miss, in [0, 1].
        scale: alpha, >= 0: factor on the update of matrices in a subspace.
        rule: ``"adam"``, or ``"momentum"``, which keeps one moment and is the same in any basis.
        switch_tolerance: Switch when the average norm of the projected gradient is at most this share of its norm when
            the subspace was entered, in [0, 1]; 0 waits for the cap.
        switch_smoothing: Weight of the past in that average, in [0, 1).
        max_inner_steps: Steps after which the subspace is found anew in any case, >= 1.
        oversample: Columns of the sketch beyond the largest rank, >= 0.
        power_iterations: Of the sketch, >= 0.
        monotone_rank: Never let the rank grow.
        second_moment_map: ``"squared"`` as above; ``"ldadam"`` maps the variance so and adds the square of the mapped
            mean (0 where that is negative); ``"none"`` leaves both moments as they are (as GaLore does, at equal rank;
            cut at a smaller one).
        seed: Of the sketches, >= 0.
        maximize: Ascend instead.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter is complex or sharded.

    Source: Refael, Svirsky, Shustin, Huleihel, Lindenbaum (2024), "AdaRankGrad", arXiv 2410.17881 (its abstract is
        verified; the loop is from memory, unverified (medium); the map of moments is second-hand). GaLore: Zhao and
        others (2024), arXiv 2403.03507. ``"ldadam"``: after LDAdam, arXiv 2410.16103 (from memory, unverified (high)).
    Differs from the paper: V is mapped by the squares of R, where R itself makes it negative, and then NaN; the switch
        compares a smoothed norm with its own start and has a cap, where an absolute bound on a stochastic gradient is
        never met; `max_residual_energy` is the share that is lost; the smallest rank that meets it is taken (a printed
        supremum would always be full); the bias correction runs through switches; one sketch serves all ranks. Its
        defaults are not known; these are ours.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(6, 8))
        >>> optimizer = AdaRankGrad([("w", w)], lr=0.1, max_rank=4)
        >>> w.grad = torch.outer(torch.arange(6.0), torch.ones(8))  # of rank 1
        >>> optimizer.step()
        >>> optimizer.ranks(), optimizer.state_bytes()["current"] < 2 * 4 * 48
        ({'w': 1}, True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_rank: int | None = None,
        min_rank: int = 1,
        max_residual_energy: float = 0.04,
        scale: float = 0.25,
        rule: Literal["adam", "momentum"] = "adam",
        switch_tolerance: float = 0.5,
        switch_smoothing: float = 0.9,
        max_inner_steps: int = 200,
        oversample: int = 4,
        power_iterations: int = 0,
        monotone_rank: bool = True,
        second_moment_map: Literal["squared", "ldadam", "none"] = "squared",
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, options)
        self.switch_log: deque[Switch] = deque(maxlen=LOG_LENGTH)
        """The latest changes of subspace; not saved."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin an empty log of switches in a copy; loading a state comes by here, too, and leaves it."""
        super().__setstate__(state)
        if "switch_log" not in self.__dict__:
            self.switch_log = deque(maxlen=LOG_LENGTH)

    @property
    def no_mean(self) -> frozenset[str]:
        """Everything, where a group has subspaces: ranks that train apart have their own."""
        return frozenset({EVERYTHING} if any(group["max_rank"] is not None for group in self.param_groups) else ())

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the class.

        Args:
            options: Of a group.

        Raises:
            InvalidArgument: One is.
        """
        check_at_least(0, lr=options["lr"], weight_decay=options["weight_decay"], scale=options["scale"])
        check_betas("betas", options["betas"])
        check_positive(eps=options["eps"])
        check_integer(1, min_rank=options["min_rank"], max_inner_steps=options["max_inner_steps"])
        check_integer(
            0, oversample=options["oversample"], power_iterations=options["power_iterations"], seed=options["seed"]
        )
        check_fraction(max_residual_energy=options["max_residual_energy"], switch_tolerance=options["switch_tolerance"])
        check_below_one(switch_smoothing=options["switch_smoothing"])
        check_choice("rule", options["rule"], ("adam", "momentum"))
        check_choice("second_moment_map", options["second_moment_map"], ("squared", "ldadam", "none"))
        if options["max_rank"] is not None:
            check_integer(1, max_rank=options["max_rank"])
            if options["min_rank"] > options["max_rank"]:
                raise InvalidArgument(
                    f"min_rank must be <= max_rank, got {options['min_rank']} and {options['max_rank']}: lower it"
                )

    def check_parameter(self, param: Tensor, place: str) -> None:
        """Refuse what is complex or sharded.

        Args:
            param: The parameter.
            place: Which one it is.

        Raises:
            InvalidArgument: It is.
        """
        super().check_parameter(param, place)
        if is_sharded(param):
            raise InvalidArgument(
                f"AdaRankGrad needs whole matrices, and {place} is sharded: use DistributedDataParallel, or another "
                "optimizer under fully_shard"
            )

    def ranks(self) -> dict[str, int]:
        """Return the rank of each matrix that has a subspace, by name or number."""
        states = ((name, self.state.get(param, {})) for name, param in self.named())
        return {name: int(state["basis"].shape[1]) for name, state in states if "basis" in state}

    def state_bytes(self) -> dict[str, int]:
        """Return the memory of the state.

        Returns:
            ``current`` bytes; ``peak``, the most between two steps so far; and ``peak_in_switch``, the most while a
            subspace was changed, old and new tensors together. Peaks are saved with the state.
        """
        current = self._bytes()
        first = self.param_groups[0]
        peak = max(current, first.get("peak_bytes", 0))
        return {"current": current, "peak": peak, "peak_in_switch": max(peak, first.get("peak_switch_bytes", 0))}

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Move some parameters of a group.

        Args:
            group: Their group.
            params: Those that have a gradient.
        """
        grads = [param.grad for param in params if param.grad is not None]
        for param in params:
            if "step" not in self.state[param]:
                self.state[param]["step"] = counter(param, capturable=False)
        states = [self.state[param] for param in params]
        steps = [int(step) for step in counted([state["step"] for state in states], capturable=False)]
        inputs = []
        for param, grad, state, step in zip(params, grads, states, steps, strict=True):
            wide = -grad if group["maximize"] else grad
            if wide.dtype in (torch.float16, torch.bfloat16):
                wide = wide.float()
            if group["max_rank"] is not None and param.ndim == 2 and param.numel():
                wide = self._projected(group, param, state, step, wide)
            inputs.append(wide)
            for name in _moments(group):
                if name not in state:
                    state[name] = torch.zeros_like(wide, memory_format=torch.contiguous_format)
        directions = _directions(group, inputs, states, steps)
        for param, direction, state in zip(params, directions, states, strict=True):
            if group["weight_decay"] != 0:
                param.mul_(1 - group["lr"] * group["weight_decay"])
            if "basis" not in state:
                param.add_(direction, alpha=-group["lr"])
                continue
            left, right = state["basis"], direction
            if param.shape[0] > param.shape[1]:
                left, right = right.T, left.T
            length = -group["lr"] * group["scale"]
            if param.dtype == left.dtype:
                param.addmm_(left, right, alpha=length)  # without the whole update beside it
            else:
                param.add_(left @ right, alpha=length)
        if any(step == 1 or int(state.get("inner_steps", 0)) == 1 for step, state in zip(steps, states, strict=True)):
            first = self.param_groups[0]
            first["peak_bytes"] = max(first.get("peak_bytes", 0), self._bytes())

    def _projected(
        self, group: Mapping[str, Any], param: Tensor, state: dict[str, Any], step: int, grad: Tensor
    ) -> Tensor:
        """Return Q^T G, after a change of Q where one is due."""
        grad = grad if grad.shape[0] <= grad.shape[1] else grad.T
        reason = _due(group, state)
        if reason:
            self._switch(group, param, state, step, grad, reason)
        found: Tensor = state["basis"].T @ grad
        norm = torch.linalg.vector_norm(found)
        if int(state["inner_steps"]) == 0:
            state["entry_norm"] = norm
            state["norm_avg"] = norm.clone()
        else:
            state["norm_avg"].lerp_(norm, 1 - group["switch_smoothing"])
        state["inner_steps"] += 1
        return found

    def _switch(
        self, group: Mapping[str, Any], param: Tensor, state: dict[str, Any], step: int, grad: Tensor, reason: str
    ) -> None:
        """Find the subspace anew, and carry the moments over."""
        short = grad.shape[0]
        old = state.get("basis")
        highest = min(group["max_rank"], short)
        if old is not None and group["monotone_rank"] and state["settled"]:
            highest = min(highest, old.shape[1])
        lowest = min(group["min_rank"], highest)
        number = next(i for i, (_, p) in enumerate(self.named()) if p is param)
        generator = torch.Generator(grad.device).manual_seed(seed_for(group["seed"], number, step))
        size = min(highest + group["oversample"], short)
        found = find_subspace(grad, size, power_iterations=group["power_iterations"], generator=generator)
        state["inner_steps"] = torch.zeros((), dtype=torch.float32)
        if found is None:  # nothing can be learnt from this gradient: try again at the next one
            state["settled"] = torch.tensor(old is not None and bool(state["settled"]))
            state["inner_steps"].fill_(group["max_inner_steps"])
            if old is not None:
                return
            state["basis"] = torch.eye(short, lowest, dtype=grad.dtype, device=grad.device)
            state["entry_norm"] = state["norm_avg"] = torch.zeros((), dtype=grad.dtype, device=grad.device)
            rank = lowest
        else:
            rank = found.rank(group["max_residual_energy"], lowest, highest)
            basis = found.basis[:, :rank].clone()
            if rank == short:  # all directions: those of the coordinates make it Adam
                basis = torch.eye(short, dtype=grad.dtype, device=grad.device)
            state["basis"], state["settled"] = basis, torch.tensor(True)
            if old is not None:
                before = self._bytes() + _size(old)
                transfer(state, state["basis"].T @ old, group["second_moment_map"], group["betas"], step - 1)
                first = self.param_groups[0]
                new = sum(_size(state[name]) for name in _moments(group))
                first["peak_switch_bytes"] = max(first.get("peak_switch_bytes", 0), before + new)
        name = self.named()[number][0]
        self.switch_log.append(Switch(step, name, 0 if old is None else old.shape[1], rank, reason))

    def _bytes(self) -> int:
        return sum(_size(t) for state in self.state.values() for t in state.values() if isinstance(t, Tensor))


def _due(group: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return why the subspace must be found anew; nothing while it is to be kept."""
    if "basis" not in state:
        return "first"
    if int(state["inner_steps"]) >= group["max_inner_steps"]:
        return "cap" if state["settled"] else "first"
    if group["switch_tolerance"] == 0:
        return ""
    fallen = state["norm_avg"] <= group["switch_tolerance"] * state["entry_norm"]
    return "tolerance" if int(state["inner_steps"]) > 0 and bool(fallen) else ""


def _directions(
    group: Mapping[str, Any], inputs: list[Tensor], states: list[dict[str, Any]], steps: Any
) -> list[Tensor]:
    """Let the moments take in gradients, projected or not, and return where the parameters go."""
    beta1, beta2 = group["betas"]
    directions = [torch.empty_like(given, memory_format=torch.contiguous_format) for given in inputs]
    lists = [
        directions,
        [t.contiguous() for t in inputs],
        *([state[name] for state in states] for name in _moments(group)),
    ]
    biases = [[1 - beta1**step for step in steps], [(1 - beta2**step) ** 0.5 for step in steps]]
    for (ds, gs, ms, *more), (firsts, seconds) in buckets(lists, biases):
        if group["rule"] == "momentum":
            torch._foreach_mul_(ms, beta1)
            torch._foreach_add_(ms, gs)
            torch._foreach_copy_(ds, ms)
            continue
        torch._foreach_lerp_(ms, gs, 1 - beta1)
        torch._foreach_mul_(more[0], beta2)
        torch._foreach_addcmul_(more[0], gs, gs, 1 - beta2)
        roots = torch._foreach_sqrt(more[0])
        torch._foreach_div_(roots, seconds)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_copy_(ds, torch._foreach_div(ms, roots))
        torch._foreach_div_(ds, firsts)
    return directions


def _moments(group: Mapping[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["rule"] == "momentum" else ("exp_avg", "exp_avg_sq")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
