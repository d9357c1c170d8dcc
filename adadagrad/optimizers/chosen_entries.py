"""The entries of one tensor that are trained: where they are, their values, and how they are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.mixing import seed_for
from adadagrad.core.vectors import HALVES


@dataclass(slots=True)
class Chosen:
    """Some entries of a tensor.

    Args:
        values: (k,) what the base optimizer trains; its `.grad` is g_I.
        wide: Whether values are kept in float32 beside entries of half precision.
        indices: (k,) places in the flattened tensor, rising; int32 where that holds them. None before the choice.
        steps: Since the latest choice.
        due: Whether the next gradient chooses anew, and must be left whole.
        share: |g_I| / |g| at the latest choice.
    """

    values: nn.Parameter
    wide: bool
    indices: Tensor | None = None
    steps: int = 0
    due: bool = False
    share: float | None = None

    @classmethod
    def of(cls, param: Tensor, rate: float, *, master: bool) -> Chosen:
        """Make room for the entries of a parameter.

        Args:
            param: The parameter.
            rate: Share of its entries.
            master: Whether entries of half precision are kept in float32.

        Returns:
            Zeros, until entries are chosen.
        """
        count, wide = min(int(rate * param.numel()) + 1, param.numel()), master and param.dtype in HALVES
        dtype = torch.float32 if wide else param.dtype
        return cls(nn.Parameter(torch.zeros(count, dtype=dtype, device=param.device)), wide)

    @property
    def count(self) -> int:
        """How many entries."""
        return self.values.numel()

    @property
    def bytes(self) -> int:
        """Of places and values."""
        held = 0 if self.indices is None else self.indices.numel() * self.indices.element_size()
        return held + self.values.numel() * self.values.element_size()

    @torch.no_grad()
    def take(self, grad: Tensor) -> None:
        """Add the chosen entries of a gradient to what is there.

        Args:
            grad: Of the tensor's shape.
        """
        found = grad.take(self._places()).to(self.values.dtype)
        self.values.grad = found if self.values.grad is None else self.values.grad.add_(found)

    def read(self, param: Tensor) -> None:
        """Take over what the entries are now: of wide values, only where someone else has changed an entry.

        Args:
            param: The tensor.
        """
        now = param.detach().take(self._places())
        if not self.wide:
            self.values.copy_(now)
        else:
            self.values.copy_(torch.where(self.values.to(now.dtype) == now, self.values, now.to(self.values.dtype)))

    def write(self, param: Tensor) -> None:
        """Set the entries to the values.

        Args:
            param: The tensor; changed in place.
        """
        param.put_(self._places(), self.values.detach().to(param.dtype))

    def refuse_converted(self, param: Tensor) -> None:
        """Refuse a tensor that is no longer what room was made for.

        Args:
            param: The tensor.

        Raises:
            InvalidArgument: It has been moved to another device, or converted.
        """
        mine = self.values
        if param.device != mine.device or (param.dtype != mine.dtype and not (self.wide and param.dtype in HALVES)):
            raise InvalidArgument(
                f"a parameter is {param.dtype} on {param.device}, and the optimizer was made for {mine.dtype} on "
                f"{mine.device}: make it after the model is moved and converted"
            )

    def replace(self, indices: Tensor, param: Tensor, norm: float, state: dict[str, Any]) -> None:
        """Go over to other entries.

        Args:
            indices: (k,) their places, rising.
            param: The tensor, with its whole gradient.
            norm: Of that gradient.
            state: The base optimizer's for the values; moments of entries that stay go with them, others become 0.
        """
        assert param.grad is not None
        if self.indices is not None:
            old = self._places()
            at = torch.searchsorted(old, indices).clamp(max=len(old) - 1)
            stays = old[at] == indices
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == self.values.shape:
                    state[name] = torch.where(stays, value[at], torch.zeros_like(value))
            if self.wide:
                self.values.copy_(torch.where(stays, self.values[at], param.detach().take(indices).float()))
        self.indices = indices.to(torch.int32) if param.numel() < 2**31 else indices
        self.steps, self.due = 0, False
        taken = float(torch.linalg.vector_norm(param.grad.take(indices), dtype=torch.float64))
        self.share = taken / norm if norm else None

    def state_dict(self, param: Tensor) -> dict[str, Any]:
        """Return what a run needs to go on with these entries.

        Args:
            param: The tensor.

        Returns:
            Plain values and tensors.
        """
        wide = {"values": self.values.detach()} if self.wide else {}
        numbers = {
            "entries": param.numel(),
            "count": self.count,
            "steps": self.steps,
            "due": self.due,
            "share": self.share,
        }
        return {"indices": self.indices, **numbers, **wide}

    def refuse_other(self, state: Mapping[str, Any], param: Tensor, number: int) -> None:
        """Refuse the state of another number of entries, or of a tensor of another size.

        Args:
            state: What `state_dict` returned.
            param: The tensor.
            number: Its number, for the message.

        Raises:
            InvalidArgument: It is.
        """
        if state["entries"] != param.numel():
            raise InvalidArgument(
                f"state is of {state['entries']} entries for parameter {number}, which has {param.numel()} here: it is "
                "of another model"
            )
        if state["count"] != self.count:
            raise InvalidArgument(
                f"state holds {state['count']} chosen entries of parameter {number}, and there are {self.count} here: "
                "give the same rate"
            )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state.

        Args:
            state: What `state_dict` returned.
        """
        indices = state["indices"]
        self.indices = None if indices is None else indices.to(self.values.device, copy=True)
        self.steps, self.due, self.share = state["steps"], state["due"], state["share"]
        self.values.grad = None
        if self.wide and "values" in state:
            self.values.copy_(state["values"])
        elif self.wide and indices is not None:  # kept in half precision there: the entries themselves are all there is
            self.values.fill_(math.nan)

    def _places(self) -> Tensor:
        assert self.indices is not None
        return self.indices.long()


def choose(group: Mapping[str, Any], param: Tensor, chosen: Chosen, number: int) -> Tensor:
    """Choose entries of a parameter.

    Args:
        group: Its group: how, and the seed.
        param: The parameter, with its whole gradient.
        chosen: How many.
        number: The parameter's, for the seed.

    Returns:
        (k,) int64 places in the flattened tensor, rising.
    """
    assert param.grad is not None
    if group["selection"] == "random":
        # A new choice is another one: the number of the old one's first entry tells them apart without a counter.
        turn = 0 if chosen.indices is None else 1 + int(chosen.indices.long().sum())
        generator = torch.Generator(param.device).manual_seed(seed_for(group["seed"], number, turn))
        order = torch.randperm(param.numel(), generator=generator, device=param.device)
        return order[: chosen.count].sort().values
    size = param.grad if group["selection"] == "gradient" else param.detach()
    return size.flatten().abs().topk(chosen.count, sorted=False).indices.sort().values
