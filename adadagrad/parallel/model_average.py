"""The mean over ranks of a model, and of what its optimizer remembers: one message for each kind of number."""

from __future__ import annotations

import copy
import zlib
from typing import Literal, TypeAlias, TypeGuard, final

import torch
from torch import Tensor, nn

from adadagrad.core.comm import Ranks, free
from adadagrad.core.errors import InvalidArgument, RanksDisagree
from adadagrad.core.optimizing import EVERYTHING, RemembersApart
from adadagrad.core.vectors import HALVES

OptimizerState: TypeAlias = Literal["average", "local", "reset"]
"""What becomes of an optimizer's state at a meeting."""


@final
class ModelAverage:
    r"""Puts the weighted mean over ranks in the place of every rank's model.

    .. math:: x = \frac{\sum_r w_r x_r}{\sum_r w_r}

    Trained parameters and floating-point buffers are averaged; under ``"average"`` also the optimizer's state: tensors
    of a parameter's shape (momentum, second moments) and those that stand in a parameter group (AdaGradNorm's
    accumulator). Step counters are left alone, and what the optimizer says has no mean. A rank of weight 0 takes part
    without adding anything, whatever numbers it holds; where it has made no update yet, its optimizer takes over what
    the others' remember.

    Args:
        model: The same on every rank, but for its values.
        optimizer: Its optimizer.
        ranks: The ranks.
        optimizer_state: What becomes of the optimizer's state.

    Raises:
        InvalidArgument: It is to be averaged, and has no mean.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, optimizer_state: OptimizerState
    ) -> None:
        self._model, self._optimizer, self._ranks = model, optimizer, ranks
        self._state = optimizer_state
        self._apart = optimizer.no_mean if isinstance(optimizer, RemembersApart) else frozenset()
        if optimizer_state == "average" and EVERYTHING in self._apart:
            raise InvalidArgument(
                f'optimizer_state="average" does not go with {type(optimizer).__name__}, whose state has no mean over '
                'ranks: use "local" or "reset"'
            )
        # As it is before the first step: torch's Adagrad has one then, and cannot do without it.
        self._initial = copy.deepcopy(optimizer.state_dict()) if optimizer_state == "reset" else {}

    @torch.no_grad()
    def share_first(self) -> None:
        """Give every rank the first one's model, frozen parameters and all buffers included."""
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._ranks.share_(tensor.data)

    @torch.no_grad()
    def form(self, weight: float) -> float:
        """Average over the ranks; a collective.

        Args:
            weight: w_r >= 0 of this rank.

        Returns:
            Sum of the weights; where it is 0, nothing is changed.

        Raises:
            RanksDisagree: The optimizers' states are not alike, so that they have no mean.
        """
        tensors = self._tensors()
        total, same = self._compare(weight, tensors)
        if not same and self._state == "average":
            self._take_kind(weight)
            tensors = self._tensors()
            _, same = self._compare(weight, tensors)
        if not same:
            raise RanksDisagree(
                "the ranks' models or optimizers hold different tensors, which have no mean: a parameter had a "
                'gradient on some ranks only; use optimizer_state="local" or "reset"'
            )
        if total > 0:
            for alike in _by_kind(tensors):
                self._average(alike, weight / total)
        if self._state == "reset":
            groups = self._optimizer.state_dict()["param_groups"]
            for group, first in zip(groups, self._initial["param_groups"], strict=True):
                group |= {name: value for name, value in first.items() if isinstance(value, Tensor) and name != "lr"}
            initial = {**self._initial, "param_groups": groups}
            self._optimizer.load_state_dict(copy.deepcopy(initial))
        return total

    def _tensors(self) -> list[Tensor]:
        """Return what is averaged."""
        tensors: list[Tensor] = [p for p in self._model.parameters() if p.requires_grad]
        tensors += [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]
        return tensors + self._remembered() if self._state == "average" else tensors

    def _compare(self, weight: float, tensors: list[Tensor]) -> tuple[float, bool]:
        """Return the sum of the weights, and whether all ranks have tensors of the same kinds."""
        mark = zlib.crc32(repr([(tuple(t.shape), t.dtype) for t in tensors]).encode())
        total, marks = self._ranks.sum(weight, float(mark))
        return total, marks == self._ranks.count * mark

    def _take_kind(self, weight: float) -> None:
        """Let a rank that has made no update take over what an optimizer remembers, as zeros, from one that has."""
        own = self._optimizer.state_dict()
        described = {
            number: {name: _described(value) for name, value in state.items()} for number, state in own["state"].items()
        }
        found = [other for other in self._ranks.gather(described if weight > 0 else None) if other is not None]
        if weight == 0 and found:
            state = {
                number: {name: _zeros(value) for name, value in state.items()} for number, state in found[0].items()
            }
            self._optimizer.load_state_dict({**own, "state": state})

    def _average(self, tensors: list[Tensor], share: float) -> None:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        flat = flat.float() if flat.dtype in HALVES else flat
        flat = flat.mul_(share) if share > 0 else flat.zero_()
        self._ranks.add_(flat)
        for tensor, mean in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(mean.view_as(tensor))
        free(flat)

    def _counts(self, name: str, value: object) -> bool:
        """Return whether an entry of a parameter's state has a mean over ranks."""
        return name != "step" and name not in self._apart and _has_mean(value)

    def _remembered(self) -> list[Tensor]:
        """Return the tensors of the optimizer's state that have a mean, in the order of its parameters."""
        found: list[Tensor] = []
        for group in self._optimizer.param_groups:
            found += [group[name] for name in sorted(group) if name != "lr" and _has_mean(group[name])]
            for p in group["params"]:
                state = self._optimizer.state.get(p, {})
                found += [state[name] for name in sorted(state) if self._counts(name, state[name])]
        return found


def _described(value: object) -> object:
    """Return shape and kind of a tensor that has a mean, and anything else, a step counter for example, as it is."""
    return value.to("meta") if _has_mean(value) and value.dim() else value


def _zeros(value: object) -> object:
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) and value.is_meta else value


def _has_mean(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _by_kind(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in groups of one device and number type, each of which makes one message."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(kinds.values())
