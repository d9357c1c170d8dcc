"""What all examples share, in one measured micro-batch: tables and layers whose output is broadcast over them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from adadagrad.core.errors import InvalidMeasurement
from adadagrad.statistics.broadcast import CallKey, Meeting, Use, uses_of
from adadagrad.statistics.calls import CREATE_GRAPH, SEVERAL_BACKWARDS, KeptCall, LayerCall
from adadagrad.statistics.table import TableRule, through_views

_CHANNELS_SECOND = (nn.GroupNorm, nn.PReLU, nn.modules.batchnorm._NormBase)
"""Layers that take the second dimension for channels, whatever the first one is."""


@dataclass(slots=True, eq=False)
class _SharedCall:
    """One call of a layer that all examples share, and the version of its input when it was called."""

    call: LayerCall
    x: Tensor
    version: int
    node: Node
    shape: torch.Size

    def for_every_example(self, n: int) -> tuple[Tensor, bool]:
        """Return the input as if it had been given once for every example, and whether a 1 made room for them."""
        single = self.x.dim() > 0 and self.x.shape[0] == 1 and self.shape[:1] == (1,)
        return self.x.expand(n, *self.x.shape[int(single) :]), single


class SharedTensors:
    """The shared tensors of one micro-batch: listens where they meet the examples, and says what was heard.

    Args:
        meetings: Where the trial runs saw each of them meet the examples.
        parameters: Parameters that no layer with a rule owns, by key.
        fail: Called with why there can be no statistic.
    """

    def __init__(
        self,
        meetings: Mapping[CallKey, tuple[Meeting, ...]],
        parameters: Mapping[nn.Parameter, CallKey],
        fail: Callable[[Exception], None],
    ) -> None:
        self._meetings, self._parameters, self._fail = meetings, parameters, fail
        self._calls: dict[CallKey, _SharedCall] = {}  # of the forward in progress
        self._heard: list[tuple[_SharedCall | CallKey, list[tuple[Use, Tensor]]]] = []  # of all forwards
        self._hooks: list[RemovableHandle] = []
        self._open = True

    def expects(self, key: CallKey) -> bool:
        """Return whether the trial runs saw the output of this call meet the examples."""
        return key in self._meetings and not torch.compiler.is_compiling()

    def add_call(self, key: CallKey, call: LayerCall, x: Tensor, y: Tensor, n: int) -> bool:
        """Take in a call of a layer that all examples share.

        Args:
            key: Name and call number, an expected one.
            call: The call.
            x: What is kept of its input.
            y: Its output, just behind the tap.
            n: Number of examples.

        Returns:
            Whether its rule can count it.
        """
        assert y.grad_fn is not None
        shared = _SharedCall(call, x, x._version, y.grad_fn, y.shape)
        repeated, single = shared.for_every_example(n)
        if isinstance(call.layer, _CHANNELS_SECOND) and not single:  # the first dimension is no position
            return False
        if not call.rule.accepts(call.layer, repeated, call.dims):
            return False
        self._calls[key] = shared
        return True

    def listen(self, output: Any, n: int, taken: Collection[nn.Parameter] = ()) -> set[nn.Parameter]:
        """Listen at every meeting in the graph of the model's output, once its forward is over.

        Args:
            output: What the model returned.
            n: Number of examples.
            taken: Parameters that are counted in another way.

        Returns:
            The parameters of shared calls that do not meet the examples where the trial runs saw them.
        """
        calls, self._calls = self._calls, {}
        raw = {key for p, key in self._parameters.items() if p not in taken}
        keys = [key for key in self._meetings if key in raw or key in calls]
        if not keys:
            return set()
        found = uses_of(output, {c.node: (key, c.shape) for key, c in calls.items()}, self._parameters)
        lost: set[nn.Parameter] = set()
        for key in keys:
            uses, meetings = found.get(key, []), self._meetings[key]
            if len(uses) == len(meetings) and all(map(partial(_as_before, n), uses, meetings)):
                heard: list[tuple[Use, Tensor]] = []
                self._heard.append((calls.get(key, key), heard))
                for use, meeting in zip(uses, meetings, strict=True):
                    self._hooks.append(use.node.register_prehook(partial(self._hear, use, meeting.dim, heard)))
            elif key in calls:
                lost.update(calls[key].call.parameters.values())
        return lost

    def close(self) -> None:
        """Stop listening, and let go of the graph: a hook that holds its own node is a circle."""
        self._open = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()

    def kept_calls(self, model: nn.Module) -> list[KeptCall]:
        """Return what was heard, as calls whose examples are known.

        Args:
            model: The model.

        Returns:
            One call per use of a parameter and per call of a layer that the backward has reached.

        Raises:
            InvalidMeasurement: The input of a layer was changed in place.
        """
        names = {key: (key[0], p) for p, key in self._parameters.items()}
        kept = []
        heard_all, self._heard = self._heard, []
        for source, heard in heard_all:
            if not heard:
                continue
            if isinstance(source, _SharedCall):
                kept.append(_layer_call(source, heard))
                continue
            name, p = names[source]
            for use, gy in heard:
                call = LayerCall(name, model, TableRule(use.end, p), {name: p}, (0, 0))
                kept.append(KeptCall(call, gy, gy, frozenset({name})))
        return kept

    def _hear(self, use: Use, dim: int, heard: list[tuple[Use, Tensor]], gradients: tuple[Tensor | None, ...]) -> None:
        """Take in the gradient that arrives at one meeting."""
        gradient = gradients[0]
        if not self._open or gradient is None:
            return
        try:
            if torch.is_grad_enabled():
                raise InvalidMeasurement(CREATE_GRAPH)
            if any(use is other for other, _ in heard):
                raise InvalidMeasurement(SEVERAL_BACKWARDS)
            heard.append((use, use.per_example(gradient.detach(), dim)))
        except Exception as error:  # a failing measurement must never harm the backward it rides on
            self._fail(error)


def _as_before(n: int, use: Use, meeting: Meeting) -> bool:
    """Whether a use is the one that the trial runs saw, with n examples."""
    if (use.kind, use.operand) != (meeting.kind, meeting.operand) or meeting.dim >= len(use.result):
        return False
    return use.result[meeting.dim] == n and use.broadcasts_over(meeting.dim)


def _layer_call(shared: _SharedCall, heard: list[tuple[Use, Tensor]]) -> KeptCall:
    """Return a shared layer's call as if it had been given its input once for every example."""
    if shared.x._version != shared.version:
        raise InvalidMeasurement(f"the input of {shared.call.name} was changed in place after the call")
    source = GradientEdge(shared.node, 0)
    gy = torch.stack([through_views(g, use.end, source) for use, g in heard]).sum(0)
    x, single = shared.for_every_example(len(gy))
    if x.is_floating_point():
        x = x.to(gy.dtype)
    return KeptCall(shared.call, x, gy.squeeze(1) if single else gy, frozenset(shared.call.parameters))
