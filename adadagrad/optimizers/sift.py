r"""SIFT: fine-tune a few entries of each tensor, those with the largest gradient, with any optimizer."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from adadagrad.core.checks import check_at_least, check_choice, check_integer, check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.optimizing import EVERYTHING
from adadagrad.core.shards import is_sharded
from adadagrad.optimizers.base import AbstractOptimizer
from adadagrad.optimizers.chosen_entries import Chosen, choose
from adadagrad.optimizers.wrapped import refuse_wrapped

OWN = ("rate", "selection", "free_gradients", "reselect_every", "master", "seed")
"""Options that are SIFT's; all others are the base optimizer's."""

SETTINGS = ("free_gradients", "master")
"""Those that say how this process trains, and stay when a state of another run is loaded."""


@final
class SIFT(AbstractOptimizer):
    r"""Train k = min(int(rate n) + 1, n) entries of every tensor of n, and leave the others as they are, bit for bit.

    .. math:: I = \operatorname{top-}k \Big| \sum_j \nabla_j \Big|, \qquad x_I \leftarrow \text{base step}(x_I, g_I)

    The gradient of the first step's micro-batches chooses; that step moves nothing but tensors that are trained whole.
    From then on a hook takes g_I out of each gradient as a backward makes it and frees the rest at once, so that no
    more than about one tensor's gradient is held. The base optimizer trains the chosen entries themselves, as
    one-dimensional tensors, so that its decay acts on the weights; they are written back within every step: nothing is
    pending when the model is saved or evaluated, and at ``rate=1`` the run is the base optimizer's own.

    State: what the base optimizer keeps for k entries, the entries, and 4 bytes for the place of each. `save_delta`
    writes what differs from the start into a file of that size, and `apply_delta` brings it back.

    With ``free_gradients=True`` gradients must reach this optimizer from one process: under DistributedDataParallel,
    which averages `.grad`, pass ``free_gradients=False``, and the step takes g_I out of the averaged gradients. `step`
    raises where it finds a wrapper of that class around its parameters, or a `.grad` written after the hook has taken
    it; gradients that a loop of your own averages it cannot see. What else works on `.grad` finds nothing there either:
    `torch.amp.GradScaler` is refused, and to clip by hand, clip `gradients()`. `AdaptiveBatch` scales and clips what
    the hooks have taken; to measure noise it needs ``free_gradients=False``, and measures that of the whole gradients.

    A tensor's entries are chosen, by any rule, when it first has a finite gradient in a step, and it waits till then.
    Make the optimizer after the model has its dtype and device.

    Args:
        params: Parameters, named parameters or groups, as from `sift_groups`; a group may set every option for itself.
        base: Makes the base optimizer: called with groups and the options that are not SIFT's.
        rate: Share of the entries of a tensor, in (0, 1]; None trains the whole tensor (a new head).
        selection: ``"gradient"``; ``"magnitude"``, the largest entries; ``"random"``.
        free_gradients: Take gradients out of `.grad` in hooks, instead of in `step`.
        reselect_every: Steps after which entries are chosen anew, from that step's gradient; the base optimizer's
            moments stay with entries that are chosen again. None keeps the first choice.
        master: Keep float32 copies of chosen entries of half-precision tensors, in which small steps add up.
        seed: Of ``"random"``.
        **base_options: Of the base optimizer, such as `lr`.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter is complex or sharded.
        TypeError: An option is neither SIFT's nor the base optimizer's.

    Source: Song, Li, Zhang, Zhao, Guo, Sun (2024), "SIFT", arXiv 2312.11875, and its code song-wx/SIFT (verified; the
        paper's text was not readable).
    Differs from the paper: no. From the code: entries are merged in the step that trains them (there during the next
        backward, so that gradients are a step stale and the last one is lost); every tensor trains, also the first
        layer's under ``model.zero_grad()`` (there it never does); decay acts on the weights (there on a difference that
        is 0); all micro-batches of the first step choose (there one).

    Example:
        >>> torch.manual_seed(0)
        <...>
        >>> model = nn.Linear(10, 5)
        >>> optimizer = SIFT(model.parameters(), torch.optim.SGD, rate=0.1, lr=0.1)
        >>> start = model.weight.detach().clone()
        >>> for _ in range(3):
        ...     model(torch.ones(1, 10)).square().sum().backward()
        ...     optimizer.step()
        >>> int((model.weight != start).sum()), model.weight.grad is None
        (6, True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        rate: float | None = 0.008,
        selection: Literal["gradient", "magnitude", "random"] = "gradient",
        free_gradients: bool = True,
        reselect_every: int | None = None,
        master: bool = True,
        seed: int = 0,
        **base_options: Any,
    ) -> None:
        if "lr" in base_options:
            check_at_least(0, lr=base_options["lr"])
        self._make_base = base
        self._chosen: dict[Tensor, Chosen] = {}
        self._hooks: dict[Tensor, Any] = {}
        self._looked = False
        self.base: torch.optim.Optimizer | None = None
        """The base optimizer, over the chosen entries and the tensors that are trained whole."""
        own = (rate, selection, free_gradients, reselect_every, master, seed)
        defaults = base([nn.Parameter(torch.zeros(1))], **base_options).defaults
        super().__init__(params, {**defaults, **dict(zip(OWN, own, strict=True))})

    @property
    def no_mean(self) -> frozenset[str]:
        """Everything: ranks that train apart choose entries of their own."""
        return frozenset({EVERYTHING})

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the class.

        Args:
            options: Of a group.

        Raises:
            InvalidArgument: One is.
        """
        if "lr" in options:
            check_at_least(0, lr=options["lr"])
        if options["rate"] is not None:
            check_positive(rate=options["rate"])
            if options["rate"] > 1:
                raise InvalidArgument(f"rate must be at most 1, got {options['rate']!r}: it is a share of the entries")
        check_choice("selection", options["selection"], ("gradient", "magnitude", "random"))
        if options["reselect_every"] is not None:
            check_integer(1, reselect_every=options["reselect_every"])
        check_integer(0, seed=options["seed"])
        for name in SETTINGS:
            if not isinstance(options[name], bool):
                raise InvalidArgument(f"{name} must be True or False, got {options[name]!r}")

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
                f"SIFT chooses among all entries of a tensor, and {place} is sharded: use DistributedDataParallel and "
                "free_gradients=False"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its entries are chosen at its first step.

        Args:
            param_group: ``params`` and any options that differ from the defaults.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        trained: list[Tensor] = []
        for param in group["params"]:
            if group["rate"] is None:
                trained.append(param)
                continue
            self._chosen[param] = Chosen.of(param, group["rate"], master=group["master"])
            trained.append(self._chosen[param].values)
            if group["free_gradients"] and param.requires_grad:  # `step` takes that of one which is unfrozen later
                self._hooks[param] = self._hook(param)
        theirs = {"params": trained, **_base_options(group)}
        if self.base is None:
            self.base = self._make_base([theirs])
        else:
            self.base.add_param_group(theirs)

    @property
    def takes_gradients(self) -> bool:
        """Whether hooks take gradients out of `.grad`."""
        return bool(self._hooks)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks of an optimizer first; it would leave the gradients scaled that hooks have taken."""
        if self._hooks:
            raise InvalidArgument(
                "GradScaler unscales .grad, out of which gradients are taken: pass free_gradients=False"
            )
        return False

    def gradients(self) -> list[Tensor]:
        """Return the gradients that hooks have taken since the last step, to be scaled and clipped in place."""
        return [chosen.values.grad for chosen in self._chosen.values() if chosen.values.grad is not None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, those that hooks have taken among them.

        Args:
            set_to_none: As for torch's optimizers; what hooks have taken is always let go.
        """
        super().zero_grad(set_to_none)
        for chosen in self._chosen.values():
            chosen.values.grad = None

    def detach(self) -> None:
        """Remove all hooks: `.grad` is left to whatever comes next; `step` goes on to work from there."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def report(self) -> list[dict[str, Any]]:
        """Return what is trained of each tensor.

        Returns:
            For each parameter its ``name``, ``entries``, ``chosen`` entries, ``bytes`` held for it between steps, and
            ``gradient_share``: |g_I| / |g| when its entries were chosen last, None before and for whole tensors.
        """
        rows = []
        for name, param in self.named():
            chosen = self._chosen.get(param)
            k, share = (param.numel(), None) if chosen is None else (chosen.count, chosen.share)
            held = self._bytes_for(param)
            rows.append({"name": name, "entries": param.numel(), "chosen": k, "bytes": held, "gradient_share": share})
        return rows

    def state_bytes(self) -> int:
        """Return the bytes held between steps: places and values of chosen entries, and the base optimizer's state."""
        return sum(self._bytes_for(param) for _, param in self.named())

    @torch.no_grad()
    def move(self) -> None:
        """Choose where that is due, let the base optimizer step, and write the chosen entries back.

        Raises:
            InvalidArgument: Gradients are averaged over ranks where hooks take them, or a parameter was converted.
        """
        assert self.base is not None
        if self._hooks and not self._looked:
            refuse_wrapped(self._hooks)
            self._looked = True
        moving: list[tuple[Tensor, Chosen, int | None]] = []
        for group, theirs in zip(self.param_groups, self.base.param_groups, strict=True):
            theirs.update(_base_options(group))
            for param in group["params"] if group["rate"] is not None else ():
                chosen = self._chosen[param]
                if self._ready(group, param, chosen):
                    chosen.read(param)
                    moving.append((param, chosen, group["reselect_every"]))
        self.base.step()
        for param, chosen, every in moving:
            chosen.write(param)
            chosen.values.grad = None
            chosen.steps += 1
            chosen.due = every is not None and chosen.steps >= every
        for group, theirs in zip(self.param_groups, self.base.param_groups, strict=True):
            # Some optimizers count in their options.
            group.update({name: theirs[name] for name in _base_options(group)})

    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Do nothing: `move` hands all groups to the base optimizer.

        Args:
            group: A group.
            params: Its parameters with a gradient.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return chosen entries, counts and the base optimizer's state; between steps, without pending gradients.

        Returns:
            Plain values and tensors, which `torch.load(weights_only=True)` reads.
        """
        assert self.base is not None
        found = super().state_dict()
        params = [param for _, param in self.named()]
        states = {i: self._chosen[p].state_dict(p) for i, p in enumerate(params) if p in self._chosen}
        return {**found, "state": states, "base": self.base.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, whether or not entries have been chosen here; `free_gradients` and `master` stay.

        Args:
            state_dict: What `state_dict` returned, for parameters of the same shapes and rates.

        Raises:
            InvalidArgument: It is another optimizer's, or holds other numbers of entries; nothing has changed then.
        """
        assert self.base is not None
        if "base" not in state_dict:
            raise InvalidArgument("state_dict must be one that SIFT's state_dict returned: it has no 'base'")
        params = [param for _, param in self.named()]
        for i, saved in state_dict["state"].items():
            self._chosen_at(params, i).refuse_other(saved, params[i], i)
        for i, param in enumerate(params):
            if param in self._chosen and i not in state_dict["state"]:
                raise InvalidArgument(f"state holds parameter {i} as trained whole, or not at all: give the same rate")
        here = [{name: group[name] for name in SETTINGS} for group in self.param_groups]
        torch.optim.Optimizer.load_state_dict(self, {"state": {}, "param_groups": state_dict["param_groups"]})
        for group, settings in zip(self.param_groups, here, strict=True):
            group.update(settings)
        for i, saved in state_dict["state"].items():
            self._chosen_at(params, i).load_state_dict(saved)
        # Copied, because torch goes on training with the very tensors that it is given.
        self.base.load_state_dict(copy.deepcopy(state_dict["base"]))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; hooks are registered anew there."""
        own = {"base": self.base, "_chosen": self._chosen, "_make_base": self._make_base, "_looked": self._looked}
        return {**super().__getstate__(), **own, "hooked": list(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy."""
        hooked = state.pop("hooked", None)
        super().__setstate__(state)
        if hooked is not None:  # torch comes by here when it loads a state, too
            self._hooks = {param: self._hook(param) for param in hooked}

    def _chosen_at(self, params: list[Tensor], number: int) -> Chosen:
        if number >= len(params) or params[number] not in self._chosen:
            raise InvalidArgument(f"state holds entries of parameter {number}, which is trained whole here, or missing")
        return self._chosen[params[number]]

    def _ready(self, group: Mapping[str, Any], param: Tensor, chosen: Chosen) -> bool:
        """Choose entries if that is due; return whether the gradient of chosen entries is there to be stepped on."""
        chosen.refuse_converted(param)
        if param.grad is not None:
            hooked, first = param in self._hooks, chosen.indices is None
            if hooked and chosen.values.grad is not None:
                raise InvalidArgument(
                    "a gradient was written after it had been taken, as DistributedDataParallel does: pass "
                    "free_gradients=False"
                )
            if first or chosen.due:
                self._choose(group, param, chosen)
            if not first:
                chosen.take(param.grad)
            if hooked:
                param.grad = None
        return chosen.values.grad is not None

    def _hook(self, param: Tensor) -> Any:
        """Have gradients of a parameter taken for as long as this optimizer is there: the hook does not keep it."""
        reference = weakref.ref(self)

        def take(param: Tensor) -> None:
            optimizer = reference()
            if optimizer is not None:
                optimizer._take(param)

        return param.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]

    def _choose(self, group: Mapping[str, Any], param: Tensor, chosen: Chosen) -> None:
        """Choose entries, if the gradient is finite: infinite ones, as of a loss scale too large, would stay chosen."""
        assert self.base is not None
        norm = float(torch.linalg.vector_norm(param.grad, dtype=torch.float64))
        if math.isfinite(norm):
            number = next(i for i, (_, p) in enumerate(self.named()) if p is param)
            chosen.replace(choose(group, param, chosen, number), param, norm, self.base.state[chosen.values])

    def _take(self, param: Tensor) -> None:
        """Take the chosen entries of a gradient that is complete, and let go of the rest."""
        chosen, grad = self._chosen[param], param.grad
        if grad is None or chosen.indices is None or chosen.due or grad.layout != torch.strided:
            return
        chosen.take(grad)
        param.grad = None

    def _bytes_for(self, param: Tensor) -> int:
        assert self.base is not None
        chosen = self._chosen.get(param)
        state = self.base.state.get(param if chosen is None else chosen.values, {})
        held = sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, Tensor))
        return held + (0 if chosen is None else chosen.bytes)


def _base_options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names", *OWN)}
