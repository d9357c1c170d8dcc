"""The patched forwards of the layers: where a call's examples are, and a tap behind it or a fused rule in its place.

Every call that autograd sees gets a tap, also where nothing can be collected: activation checkpointing repeats calls in
the backward and expects each to save what it saved before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidMeasurement
from adadagrad.statistics.broadcast import CallKey
from adadagrad.statistics.calls import UNSEEN_PATH, LayerCall, in_backward, input_to_keep
from adadagrad.statistics.forward_state import ForwardState
from adadagrad.statistics.fusing import Fused, fused_call
from adadagrad.statistics.intake import Intake
from adadagrad.statistics.layout import Layout
from adadagrad.statistics.rules import AbstractFusedRule, AbstractRule
from adadagrad.statistics.rules.base import own_parameters
from adadagrad.statistics.rules.squaring import SquareSums, Squaring
from adadagrad.statistics.shared import SharedTensors
from adadagrad.statistics.taps import Tap


class LayerTaps:
    """All layer calls of one measured micro-batch.

    Args:
        state: Where the micro-batch is.
        layout: Where the examples are.
        tensors: What all examples share.
        intake: Takes in what the taps bring.
        excluded: Parameters that the fallback counts.
        sharded: Whether layers hold other tensors in a forward, gathered from the shards that are the parameters.
    """

    def __init__(
        self,
        state: ForwardState,
        layout: Layout,
        tensors: SharedTensors,
        intake: Intake,
        excluded: set[nn.Parameter],
        *,
        sharded: bool = False,
    ) -> None:
        self._state, self._layout, self._tensors = state, layout, tensors
        self._intake, self._excluded, self._sharded = intake, excluded, sharded
        self.own: dict[str, dict[str, nn.Parameter]] = {}
        """What layers train, by name, before anything is put in its place for a call; of those with a fused rule, or
        of all where they are sharded."""
        self._seen: dict[tuple[str, torch.Size, torch.Size], set[tuple[int, int] | None]] = {}

    def forward(
        self,
        name: str,
        layer: nn.Module,
        inner: Callable[..., Tensor],
        rule: AbstractRule[Any],
        fused: AbstractFusedRule[Any] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return a layer's output; what replaces its forward.

        Args:
            name: Qualified name of the layer.
            layer: The module.
            inner: Its own forward.
            rule: Its rule.
            fused: Its fused rule, None where it has none or none may be used.
            *args: Arguments of the call.
            **kwargs: Keyword arguments of the call.

        Returns:
            What `inner` returns, with a node of this measurement behind it.
        """
        state = self._state
        x = args[0] if args else kwargs.get("input")
        if fused is not None and isinstance(x, Tensor) and x.dim() > 2 and len(args) + len(kwargs) == 1:
            y = self._fused(name, layer, rule, fused, x)
            if y is not None:
                return y
        y = inner(*args, **kwargs)
        if not isinstance(x, Tensor) or state.between_trials:
            return y
        key = state.number(name)
        if state.calibration is not None:
            state.calibration.note(key, layer, x, y, state.trial_rows)
            return y
        trained = self.own[name] if self._sharded else own_parameters(layer)
        parameters = {k: p for k, p in trained.items() if p not in self._excluded}
        seen = torch.is_grad_enabled() and y.requires_grad  # by autograd
        if state.leaf is None:
            state.shared.update(parameters.values() if seen else ())
            return y
        dims = None
        if state.depth:
            self._intake.count_use(parameters.values())  # without autograd too: a checkpoint may repeat it with
            dims = self._place(key, layer, rule, x, y, state.leaf, seen)
        elif seen:
            dims = self._place_again(name, x, y)
        if not seen:
            return y
        call = None if dims is None or not parameters else LayerCall(name, layer, rule, parameters, dims)
        kept = input_to_keep(x, y, call)
        collect = partial(self._intake.collect, call)
        tapped: Tensor = Tap.apply(y, kept, state.leaf, collect)  # type: ignore[no-untyped-call]
        if dims is None:
            everyones = LayerCall(name, layer, rule, parameters, (0, 0))
            if not self._is_broadcast(key, everyones, x, tapped, len(state.leaf)):
                state.shared.update(parameters.values())
        return tapped

    def _fused(
        self, name: str, layer: nn.Module, rule: AbstractRule[Any], fused: AbstractFusedRule[Any], x: Tensor
    ) -> Tensor | None:
        """Return the output of a call that its fused rule takes over, None where it is not.

        The decision depends on the module and its input alone, so that a checkpoint repeats it.
        """
        state = self._state
        if state.leaf is None or state.calibration is not None or not self._layout.examples_first(name):
            return None
        if not state.depth and not in_backward():
            return None  # outside of the model, where calls are not counted
        sums = SquareSums()
        taken = fused_call(layer, Squaring(fused, sums) if self._intake.square else fused, x, state.leaf)
        if taken is None or not self._excluded.isdisjoint(taken.parameters.values()):
            return None
        parameters, own = taken.parameters, self.own.get(name, {})
        if any(own.get(k) is not p for k, p in parameters.items()):
            return None  # put there for this call, by functional_call, and gone again in the backward
        call = LayerCall(name, layer, rule, parameters, (0, 0), sums)
        if state.depth:
            state.number(name)
            self._intake.count_use(parameters.values())
        collect = partial(self._intake.collect, call)
        y: Tensor = Fused.apply(x, state.leaf, taken, collect, *parameters.values())  # type: ignore[no-untyped-call]
        return y

    def _is_broadcast(self, key: CallKey, call: LayerCall, x: Tensor, y: Tensor, n: int) -> bool:
        """Whether a call that all examples share is broadcast over them, and its rule can count it there."""
        if not (self._state.depth and call.parameters and self._tensors.expects(key)):
            return False
        return self._tensors.add_call(key, call, input_to_keep(x, y, call), y, n)

    def _place(
        self, key: CallKey, layer: nn.Module, rule: AbstractRule[Any], x: Tensor, y: Tensor, leaf: Tensor, seen: bool
    ) -> tuple[int, int] | None:
        """Return where the examples of a call inside the model are, None if they are not known."""
        try:
            dims = self._layout.batch_dims(key, x, y, len(leaf))
        except KeyError:
            if seen and self._intake.failure is None:
                self._layout.calibrated = False  # a path that the trial runs did not see: look again
                self._intake.fail(InvalidMeasurement(UNSEEN_PATH))
            return None
        if dims is not None and not rule.accepts(layer, x, dims):
            dims = None
        self._seen.setdefault((key[0], x.shape, y.shape), set()).add(dims)
        return dims

    def _place_again(self, name: str, x: Tensor, y: Tensor) -> tuple[int, int] | None:
        """Return where the examples are in a call that activation checkpointing repeats in the backward."""
        found = self._seen.get((name, x.shape, y.shape), {None}) if in_backward() else {None}
        return next(iter(found)) if len(found) == 1 else None
