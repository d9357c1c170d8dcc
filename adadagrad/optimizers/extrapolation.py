"""What ExtrapolatedSGD and ExtrapolatedAdam share: gradients at displaced parameters, and each worker's last one."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument, StepError
from adadagrad.core.shards import is_sharded
from adadagrad.optimizers.base import AbstractOptimizer, place_in_group
from adadagrad.optimizers.extrapolation_hook import show_before_average
from adadagrad.optimizers.extrapolation_noise import Kept
from adadagrad.optimizers.extrapolation_window import LocalGradients


class AbstractExtrapolated(AbstractOptimizer):
    r"""An optimizer that wants the gradient at parameters that are displaced by a known amount.

    .. math:: z_t^k = w_{t-1} + \zeta_t^k, \qquad g_t^k = \nabla f(z_t^k), \qquad w_t = w_{t-1} + \ldots

    Inside ``with optimizer.extrapolated():`` the parameters are z, everywhere else they are w, the point that the
    update starts from, that is evaluated and saved. They are changed in place, so that wrappers, shards and views see
    z, and put back from an exact copy, also after an error. Evaluation inside the context would see z.

    A window is all that happens between two steps. It may enter the context several times, one after the other.
    `step` refuses gradients that were computed without it, unless nothing is displaced anyway. `zero_grad` begins a new
    window; so does entering the context while no parameter has a gradient.

    Args:
        params: Parameters, named parameters or groups.
        defaults: Options by name. ``workers`` is the same in all groups.

    Raises:
        InvalidArgument: An option is out of its range, or a parameter cannot be trained so.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._hooked = False
        self._begin()
        super().__init__(params, defaults)

    def _begin(self) -> None:
        self._window = LocalGradients()
        self._inside = False
        self._used = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, with a new window."""
        super().__setstate__(state)
        self.__dict__.setdefault("_hooked", False)
        self._begin()

    @property
    def no_mean(self) -> frozenset[str]:
        """Past local gradients: their mean would displace all ranks alike."""
        return frozenset({"local_gradient"})

    @abc.abstractmethod
    def keeps_local(self, group: Mapping[str, Any]) -> bool:
        """Return whether a group is displaced along each worker's own last gradient.

        Args:
            group: The group.
        """

    @abc.abstractmethod
    def displaces(self, group: Mapping[str, Any]) -> bool:
        """Return whether z may differ from w in a group.

        Args:
            group: The group.
        """

    @abc.abstractmethod
    def displace(self, group: Mapping[str, Any], first: int, worker: int, kept: Kept) -> None:
        """Turn the parameters of a group from w into z, in place; without gradient tracking.

        Args:
            group: The group.
            first: Number of its first parameter among all.
            worker: Which simulated worker, from 0.
            kept: Is given every tensor before it is changed.
        """

    @property
    def workers(self) -> int:
        """K, the number of simulated workers."""
        return int(self.param_groups[0]["workers"])

    @property
    def own_state(self) -> bool:
        """Whether the state differs between ranks that train one model, so that each must be saved."""
        return any(self.keeps_local(group) for group in self.param_groups)

    @property
    def needs_local_gradients(self) -> bool:
        """Whether it must still be shown each rank's own gradient, where a wrapper averages during the backward.

        `keep_local_gradients` does so for DistributedDataParallel.
        """
        return self.own_state and not self._hooked

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: ``params`` and any options that differ from the defaults.

        Raises:
            InvalidArgument: An option is out of its range, or a parameter cannot be trained so.
            StepError: The parameters are displaced.
        """
        if self._inside:
            raise StepError(f"add_param_group was called {_INSIDE}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if group["workers"] != self.workers:
                raise InvalidArgument(
                    f"workers must be the same in all groups, got {self.workers} and {group['workers']}: "
                    "give it to the optimizer"
                )
            if self._hooked and self.workers > 1:
                raise InvalidArgument(_NO_HOOK)
            for index, param in enumerate(group["params"]):
                self.check_placement(group, param, place_in_group(index, param))
        except InvalidArgument:
            del self.param_groups[-1]
            raise

    def check_placement(self, group: Mapping[str, Any], param: Tensor, place: str) -> None:
        """Refuse a sharded parameter whose rank never sees what the displacement is made from.

        Args:
            group: Its group.
            param: The parameter.
            place: Which one it is, for the message.

        Raises:
            InvalidArgument: It is sharded, and the displacement is along a local gradient.
        """
        if is_sharded(param) and self.keeps_local(group):
            raise InvalidArgument(
                f"{self.local_option} needs each rank's own gradient, which a sharded model never forms, got a sharded "
                f"tensor for {place}: use {self.local_remedy}, or DistributedDataParallel"
            )

    local_option: str
    """How the option that asks for local gradients is written."""

    local_remedy: str
    """What to write in its place."""

    @contextmanager
    def extrapolated(self, worker: int | None = None) -> Iterator[None]:
        """Displace the parameters inside the context, around a forward and its backward.

        After an error the parameters are put back, and nothing of it is kept as a local gradient. Where the context
        itself keeps local gradients (``needs_local_gradients``), `.grad` is then what it was on entry, so that the
        window can be tried again. Otherwise `.grad` holds what the failed backward has left, as in any loop.

        Args:
            worker: Which of the simulated workers this backward is for, from 0 to ``workers`` - 1. Its loss is
                divided by their number, as gradients of micro-batches are that add up to their mean. May be left out
                where there is one.

        Yields:
            Nothing.

        Raises:
            InvalidArgument: There is no such worker, or several and none is named.
            StepError: The context is entered already.
        """
        if self._inside:
            raise StepError(f"extrapolated() was entered {_INSIDE}")
        if worker is None and self.workers == 1:
            worker = 0
        if isinstance(worker, bool) or not isinstance(worker, int) or not 0 <= worker < self.workers:
            raise InvalidArgument(
                f"worker must be an integer from 0 to {self.workers - 1}, got {worker!r}: enter "
                "extrapolated(worker=k) once for each of the simulated workers, or build the optimizer with workers=1"
            )
        everything = [param for group in self.param_groups for param in group["params"]]
        if all(param.grad is None for param in everything):
            self._window.clear()
            self._used = False
        recorded = [] if self._hooked else [p for g in self.param_groups if self._keeps(g) for p in g["params"]]
        kept, finished = Kept(), False
        self._inside = True
        try:
            self._displace(worker, kept)
            torch.clear_autocast_cache()  # of weights at w
            self._window.set_aside(recorded)
            yield
            finished = True
        finally:
            kept.restore()
            torch.clear_autocast_cache()  # of weights at z
            self._inside = False
            if not finished:
                self._window.put_back(recorded)
        self._window.record(recorded, worker, self.workers)
        self._used = True

    @torch.no_grad()
    def _displace(self, worker: int, kept: Kept) -> None:
        first = 0
        for group in self.param_groups:
            self.displace(group, first, worker, kept)
            first += len(group["params"])

    def _keeps(self, group: Mapping[str, Any]) -> bool:
        """Whether local gradients of a group are used at all."""
        return self.keeps_local(group) and group["extrapolation"] != 0

    def evaluate(self, closure: Callable[[], float] | None) -> float | None:
        """Evaluate a closure, and refuse what cannot be trained on.

        Args:
            closure: The user's, which enters `extrapolated` itself; or None.

        Returns:
            What it returned.

        Raises:
            InvalidArgument: A gradient is sparse.
            StepError: The parameters are displaced, or the gradients are not those at displaced parameters.
        """
        if self._inside:
            raise StepError(f"step was called {_INSIDE}")
        loss = super().evaluate(closure)
        groups = [g for g in self.param_groups if any(param.grad is not None for param in g["params"])]
        if not self._used and any(self.displaces(group) for group in groups):
            raise StepError(
                f"{type(self).__name__} needs gradients at displaced parameters, and none was computed so since the "
                "last step: put forward and backward into `with optimizer.extrapolated():`"
            )
        if self._hooked and self._window.empty and any(self._keeps(group) for group in groups):
            raise StepError(
                "no local gradient was seen since the last step: the last backward before a step must be one in which "
                "the wrapper averages, inside `with optimizer.extrapolated():`"
            )
        if self._window.mixed:
            raise StepError(
                "gradients were averaged over ranks twice since the last step, so that a local gradient is lost: "
                "accumulate under the wrapper's no_sync(), but for the last backward"
            )
        return loss

    @torch.no_grad()
    def move(self) -> None:
        """Update all groups from the gradients that are there, and begin a new window."""
        super().move()
        self._window.clear()
        self._used = False

    def remember_local(self, group: Mapping[str, Any], params: list[Tensor]) -> None:
        """Keep the window's local gradients for the next one.

        Args:
            group: A group.
            params: Those of its parameters that take part in the step.
        """
        keeps = self._keeps(group)
        for param in params:
            found = self._window.take(param) if keeps else None
            if found is not None:
                self.state[param]["local_gradient"] = found
            else:
                self.state[param].pop("local_gradient", None)

    def local_gradient(self, param: Tensor, worker: int) -> Tensor | None:
        """Return a worker's last local gradient.

        Args:
            param: One of the parameters.
            worker: Which worker, from 0.

        Returns:
            A tensor of its shape; None for 0, also where what is there belongs to another number of workers.
        """
        found: Tensor | None = self.state.get(param, {}).get("local_gradient")
        workers = self.workers
        if found is None or found.shape != (param.shape if workers == 1 else (workers, *param.shape)):
            return None
        return found if workers == 1 else found[worker]

    def keep_local_gradients(self, model: nn.Module) -> None:
        """Keep each rank's own gradient under DistributedDataParallel, which averages them during the backward.

        A communication hook copies what is sent, and has it averaged as ever. Without it ``.grad`` holds the average
        when the context is left, and the displacement would be the same on all ranks.

        Args:
            model: The wrapped model, without a communication hook of its own.

        Raises:
            InvalidArgument: It is not wrapped, has a hook, or several workers are simulated in one process.
        """
        if self.workers > 1:
            raise InvalidArgument(_NO_HOOK)
        show_before_average(model, self._receive)
        self._hooked = True

    def _receive(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Take what a bucket holds before it is averaged."""
        keeping = {param for group in self.param_groups if self._keeps(group) for param in group["params"]}
        for param, grad in zip(params, grads, strict=True):
            if param in keeping:
                self._window.receive(param, grad, wanted=self._inside)

    def scale_local_(self, factor: float) -> None:
        """Multiply what was kept of the present window's gradient by what the gradient itself was multiplied by.

        Args:
            factor: The factor, such as 1 / scale after unscaling.
        """
        self._window.scale_(factor)

    @torch.no_grad()
    def forget_local_gradients(self) -> None:
        """Set all local gradients to 0, so that the next step is one without extrapolation along them."""
        for state in self.state.values():
            if "local_gradient" in state:
                state["local_gradient"].zero_()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them what was kept of the present window.

        Args:
            set_to_none: Drop the tensors instead of filling them with 0.
        """
        super().zero_grad(set_to_none)
        self._window.zero_aside(set_to_none=set_to_none)
        self._window.clear()
        self._used = False

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state; see `AbstractOptimizer.load_state_dict`. A window that has begun is forgotten.

        Args:
            state_dict: What `state_dict` returned on this rank.

        Raises:
            StepError: The parameters are displaced.
        """
        if self._inside:
            raise StepError(f"load_state_dict was called {_INSIDE}")
        super().load_state_dict(state_dict)


_INSIDE = "inside `with optimizer.extrapolated():`, where the parameters are displaced: leave it first"
_NO_HOOK = "workers must be 1 under DistributedDataParallel, where every rank is a worker: build the optimizer so"
