"""The patched forwards of layers whose calls are seen whole, in one measured micro-batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidMeasurement
from adadagrad.statistics.broadcast import CallKey
from adadagrad.statistics.calls import UNSEEN_PATH, LayerCall, in_backward
from adadagrad.statistics.forward_state import ForwardState
from adadagrad.statistics.intake import Intake
from adadagrad.statistics.layout import Layout
from adadagrad.statistics.places import Dims
from adadagrad.statistics.rules import AbstractWholeRule
from adadagrad.statistics.rules.example_by_example import GenericRule
from adadagrad.statistics.rules.whole import RecordedCall
from adadagrad.statistics.whole_calls import WholeCall


class WholeForwards:
    """All such calls of one measured micro-batch, beside the layer calls of `LayerTaps`.

    Args:
        state: Where the micro-batch is.
        layout: Where the examples are.
        intake: Takes in what the taps bring.
        raw: Parameters that no layer with an ordinary rule owns, with their keys.
        excluded: Parameters that the fallback counts.
    """

    def __init__(
        self,
        state: ForwardState,
        layout: Layout,
        intake: Intake,
        raw: Mapping[nn.Parameter, CallKey],
        excluded: set[nn.Parameter],
    ) -> None:
        self._state, self._layout, self._intake = state, layout, intake
        self._raw, self._excluded = raw, excluded
        self.taken: set[nn.Parameter] = set()
        """Parameters that are counted here, and so not where they may be broadcast over the examples as well."""
        self._seen: dict[tuple[Any, ...], set[Dims | None]] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        name: str,
        layer: nn.Module,
        inner: Callable[..., Any],
        rule: AbstractWholeRule[Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return a layer's outputs; what replaces its forward.

        Args:
            name: Qualified name of the layer.
            layer: The module.
            inner: Its own forward.
            rule: Its rule.
            *args: Arguments of the call.
            **kwargs: Keyword arguments of the call.

        Returns:
            What `inner` returns, with copies behind a tap in the place of what autograd differentiates.
        """
        state = self._state
        if state.between_trials:
            return inner(*args, **kwargs)
        key = state.number(name)
        if state.calibration is None and state.leaf is None:
            return inner(*args, **kwargs)  # nothing is counted, so the fallback will ask
        call = WholeCall.make(layer, inner, rule, args, kwargs)
        if state.calibration is not None:
            state.calibration.note_whole(key, layer, call.leaves, call.outputs, state.trial_rows)
            return call.result
        assert state.leaf is not None
        parameters = {k: p for k, p in layer.named_parameters() if p.requires_grad and p not in self._excluded}
        seen = torch.is_grad_enabled() and bool(call.differentiated)
        dims = None
        if state.depth:
            self._intake.count_use(parameters.values())  # without autograd too: a checkpoint may repeat it with
            dims = self._place(key, call, len(state.leaf), seen)
        elif seen and in_backward():
            found = self._seen.get((name, *call.shapes), {None})
            dims = next(iter(found)) if len(found) == 1 else None
        if not seen:
            return call.result
        if isinstance(rule, GenericRule):
            reached = call.reached()  # the others get no gradient, and are not missing
            parameters = {k: p for k, p in parameters.items() if p in reached}
            if self._all_met(parameters.values()):
                return call.result
        if not parameters:
            return call.result
        recorded = None if dims is None else call.recorded(dims)
        if recorded is None:
            state.shared.update(parameters.values())
            return call.result
        self.taken.update(parameters.values())
        call.tap(partial(self._collect, name, rule, recorded, parameters), state.leaf)
        return call.result

    def _all_met(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether all parameters are counted, for less, where they are broadcast over the examples."""
        return all(self._raw.get(p) in self._layout.meetings for p in parameters)

    def _place(self, key: CallKey, call: WholeCall, n: int, seen: bool) -> Dims | None:
        """Return where the examples of a call inside the model are, None if they are not known."""
        try:
            dims = self._layout.whole_dims(key, call.leaves, call.outputs, n)
        except KeyError:
            if seen and self._intake.failure is None:
                self._layout.calibrated = False  # a path that the trial runs did not see: look again
                self._intake.fail(InvalidMeasurement(UNSEEN_PATH))
            return None
        self._seen.setdefault((key[0], *call.shapes), set()).add(dims)
        return dims

    def _collect(
        self,
        name: str,
        rule: AbstractWholeRule[Any],
        recorded: RecordedCall,
        parameters: dict[str, nn.Parameter],
        gradients: tuple[Tensor | None, ...],
    ) -> Tensor | None:
        """Take in the gradients of all outputs of one call; return the squares of its parts."""
        intake = self._intake
        if not intake.listening:
            return None
        started = time.perf_counter()
        try:
            intake.admit(recorded, name, intact=recorded.untouched())
            parts = rule.parts(recorded, gradients, parameters.keys())
        except InvalidMeasurement as error:
            intake.fail(error)
            return None
        except Exception:  # it cannot be done over: the fallback counts, or refuses by name
            self._state.shared.update(parameters.values())
            return None
        finally:
            intake.seconds += time.perf_counter() - started
        calls = []
        for part in parts:
            own = {known: parameters[k] for known, k in part.names.items()}
            calls.append((LayerCall(name, recorded.layer, part.rule, own, (0, 0)), part.x, part.gy))
        for p in parameters.values():
            intake.uses[p] -= 1  # the call itself has been counted once
        intake.count_use(p for call, _, _ in calls for p in call.parameters.values())
        shares = [share for share in (intake.collect(*call) for call in calls) if share is not None]
        return torch.stack(shares).sum(0) if shares else None
