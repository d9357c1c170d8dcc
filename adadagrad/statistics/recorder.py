"""One measured micro-batch: taps on every layer that has a rule, and what they delivered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adadagrad.core.errors import AdadagradError, InvalidMeasurement, StepError
from adadagrad.statistics.broadcast import CallKey
from adadagrad.statistics.calls import SEVERAL_BACKWARDS, KeptCall, LayerCall, input_to_keep
from adadagrad.statistics.fallback import ModelCall
from adadagrad.statistics.fusing import Fused, fused_call
from adadagrad.statistics.layout import Layout
from adadagrad.statistics.rules import AbstractFusedRule, AbstractRule, find_fused, find_rule
from adadagrad.statistics.rules.base import own_parameters
from adadagrad.statistics.shared import SharedTensors, raw_parameters
from adadagrad.statistics.taps import Forward, Tap


class Recorder:
    """Patched forwards of one micro-batch, and everything they found.

    Every call that autograd sees gets a tap, also where nothing can be collected: activation checkpointing
    repeats calls in the backward and expects each to save what it saved before.

    Args:
        model: The model.
        layout: Where the examples are; calibrated here at the model's first call.
        num_examples: n, or None to read it off the model's first tensor argument.
        excluded: Parameters that the fallback counts.
        keep_all: Keep every call's tensors, for inner products, coordinates or verification, and deliver
            nothing through the leaf.
        watch_model: Also keep the model's arguments and output gradients, for the fallback.
        calibrate: Make the trial runs if they have not been made.
        fuse: Form weight gradients example by example where a fused rule suits.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        num_examples: int | None,
        excluded: set[nn.Parameter],
        *,
        keep_all: bool,
        watch_model: bool,
        calibrate: bool,
        fuse: bool,
    ) -> None:
        self.fuse = fuse
        self.model, self.layout, self.n = model, layout, num_examples
        self.excluded, self.keep_all, self.watch_model, self.calibrate = excluded, keep_all, watch_model, calibrate
        self.leaf: Tensor | None = None
        self.kept: list[KeptCall] = []
        self.model_calls: list[ModelCall] = []
        self.shared: set[nn.Parameter] = set()  # in a call whose examples are not known
        self.counted: set[nn.Parameter] = set()  # delivered or kept
        self.delivered = False  # whether any squares went through the leaf
        self.failure: Exception | None = None
        self.seconds = 0.0  # spent in taps and trial runs
        self._raw = {p: key for p, key in raw_parameters(model).items() if p not in excluded}
        self._tensors = SharedTensors(layout.meetings, self._raw, self._fail)
        self._uses: Counter[nn.Parameter] = Counter()  # calls per parameter in this micro-batch
        self._calls: Counter[str] = Counter()  # calls per module in one forward of the model
        self._seen: dict[tuple[str, torch.Size, torch.Size], set[tuple[int, int] | None]] = {}
        self._fired: set[LayerCall] = set()
        self._calibrating, self._trial_rows = False, 0
        self._inside = 0  # depth of calls of the model
        self._open = True

    def forwards(self) -> dict[nn.Module, Forward]:
        """Return the replacement forward of every layer with a rule, and of the model itself.

        Raises:
            StepError: A module is being measured already.
        """
        found: dict[nn.Module, Forward] = {}
        for name, module in self.model.named_modules():
            if _is_recorded(module):
                raise StepError(
                    f"{name or 'the model'} is being measured already: leave that measurement before another one starts"
                )
            rule = find_rule(module)
            if rule is not None and own_parameters(module):
                fused = find_fused(module) if self.fuse else None
                found[module] = partial(self._layer_forward, name, module, module.forward, rule, fused)
        found[self.model] = partial(self._model_forward, found.get(self.model, self.model.forward))
        return found

    def close(self) -> None:
        """Stop listening: graphs that outlive the micro-batch deliver nothing."""
        self._open = False
        self._tensors.close()

    def gather(self) -> None:
        """Count what came to shared tensors, once the backward is over."""
        for entry in self._tensors.kept_calls(self.model):
            self.kept.append(entry)
            self.counted.update(entry.call.parameters.values())

    def _fail(self, error: Exception) -> None:
        self.failure = error

    def _model_forward(self, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or self.failure is not None:
            return self._counting_anew(inner, args, kwargs)
        if self._fired and not _in_backward():
            self.failure = InvalidMeasurement(SEVERAL_BACKWARDS)
            return inner(*args, **kwargs)
        self._prepare(args, kwargs)
        if self.n is not None and self.failure is None and self.calibrate and self.layout.due(self.n):
            started = time.perf_counter()
            self._calibrating = True
            try:
                self.layout.calibrate(self.model, partial(self._trial, inner), args, kwargs, self.n, self._raw)
            except AdadagradError as error:
                self.failure = error
            finally:
                self._calibrating = False
            self.seconds += time.perf_counter() - started
        output = self._counting_anew(inner, args, kwargs)
        if self.n is not None and self.failure is None:
            self.shared |= self._tensors.listen(output, self.n)
        if self.watch_model:
            call = ModelCall.now(args, kwargs)
            output = call.watch(output)
            self.model_calls.append(call)
        return output

    def _trial(self, inner: Forward, rows: int, args: Any, kwargs: dict[str, Any]) -> Any:
        self._trial_rows = rows
        try:
            return self._counting_anew(inner, args, kwargs)
        finally:
            self._trial_rows = 0

    def _counting_anew(self, inner: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        self._calls.clear()
        self._inside += 1
        try:
            return inner(*args, **kwargs)
        finally:
            self._inside -= 1

    def _prepare(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Make the leaf at the model's first call, when n is known."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if self.n is None and tensors:
            self.n = tensors[0].shape[0]
        if self.n is None or not any(t.shape[0] == self.n for t in tensors):
            self.failure = InvalidMeasurement(
                f"no tensor argument of the model has the {self.n} examples in its first dimension; pass the "
                "batch to the model as a tensor with the examples first, or use estimator=MicroBatch()"
            )
        elif self.leaf is None:
            device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
            self.leaf = torch.zeros(self.n, dtype=torch.float64, device=device, requires_grad=True)

    def _layer_forward(
        self,
        name: str,
        layer: nn.Module,
        inner: Callable[..., Tensor],
        rule: AbstractRule[Any],
        fused: AbstractFusedRule[Any] | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        x = args[0] if args else kwargs.get("input")
        if fused is not None and isinstance(x, Tensor) and len(args) + len(kwargs) == 1:
            y = self._fused_forward(name, layer, rule, fused, x)
            if y is not None:
                return y
        y = inner(*args, **kwargs)
        if not isinstance(x, Tensor) or (self._calibrating and not self._trial_rows):
            return y  # the latter where a trial's own backward repeats a checkpoint
        key = (name, self._calls[name])
        self._calls[name] += 1
        if self._trial_rows:
            self.layout.note(key, layer, x, y, self._trial_rows)
            return y
        parameters = {k: p for k, p in own_parameters(layer).items() if p not in self.excluded}
        seen = torch.is_grad_enabled() and y.requires_grad  # by autograd
        if self.leaf is None:
            self.shared.update(parameters.values() if seen else ())
            return y
        dims = None
        if self._inside:
            self._uses.update(parameters.values())  # without autograd too: a checkpoint may repeat it with
            dims = self._place(key, layer, rule, x, y, seen)
        elif seen:
            dims = self._place_again(name, x, y)
        if not seen:
            return y
        call = None if dims is None or not parameters else LayerCall(name, layer, rule, parameters, dims)
        kept = input_to_keep(x, y, call)
        tapped: Tensor = Tap.apply(y, kept, self.leaf, partial(self._collect, call))  # type: ignore[no-untyped-call]
        if dims is None and not self._is_broadcast(key, LayerCall(name, layer, rule, parameters, (0, 0)), x, tapped):
            self.shared.update(parameters.values())
        return tapped

    def _is_broadcast(self, key: CallKey, call: LayerCall, x: Tensor, y: Tensor) -> bool:
        """Whether a call that all examples share is broadcast over them, and its rule can count it there."""
        if not (self._inside and call.parameters and self._tensors.expects(key)):
            return False
        assert self.leaf is not None
        return self._tensors.add_call(key, call, input_to_keep(x, y, call), y, len(self.leaf))

    def _fused_forward(
        self, name: str, layer: nn.Module, rule: AbstractRule[Any], fused: AbstractFusedRule[Any], x: Tensor
    ) -> Tensor | None:
        """Return the output of a call that its fused rule takes over, None where it is not.

        The decision depends on the module and its input alone, so that a checkpoint repeats it.
        """
        if self.leaf is None or self._calibrating or not self.layout.examples_first(name):
            return None
        taken = fused_call(layer, fused, x, self.leaf)
        parameters = own_parameters(layer)
        if taken is None or not self.excluded.isdisjoint(parameters.values()):
            return None
        call = LayerCall(name, layer, rule, parameters, (0, 0))
        if self._inside:
            self._calls[name] += 1
            self._uses.update(parameters.values())
        y: Tensor = Fused.apply(x, self.leaf, taken, partial(self._collect, call), *parameters.values())  # type: ignore[no-untyped-call]
        return y

    def _place(
        self, key: CallKey, layer: nn.Module, rule: AbstractRule[Any], x: Tensor, y: Tensor, seen: bool
    ) -> tuple[int, int] | None:
        """Return where the examples of a call inside the model are, None if they are not known."""
        assert self.leaf is not None
        try:
            dims = self.layout.batch_dims(key, x, y, len(self.leaf))
        except KeyError:
            if seen and self.failure is None:
                self.layout.calibrated = False  # a path that the trial runs did not see: look again
                self.failure = InvalidMeasurement("the model's forward took a path that has not been seen before")
            return None
        if dims is not None and not rule.accepts(layer, x, dims):
            dims = None
        self._seen.setdefault((key[0], x.shape, y.shape), set()).add(dims)
        return dims

    def _place_again(self, name: str, x: Tensor, y: Tensor) -> tuple[int, int] | None:
        """Return where the examples are in a call that activation checkpointing repeats in the backward."""
        found = self._seen.get((name, x.shape, y.shape), {None}) if _in_backward() else {None}
        return next(iter(found)) if len(found) == 1 else None

    def _collect(
        self,
        call: LayerCall | None,
        x: Tensor | None,
        gy: Tensor,
        squares: Tensor | None = None,
        seconds: float = 0.0,
    ) -> Tensor | None:
        """Take in one call's output gradient during the backward; return its squares (a fused rule's, if given)."""
        if call is None or not self._open or self.failure is not None:
            return None
        started = time.perf_counter()
        try:
            if torch.is_grad_enabled():
                raise InvalidMeasurement("a backward with create_graph=True cannot be measured: use MicroBatch()")
            if call in self._fired:
                raise InvalidMeasurement(SEVERAL_BACKWARDS)
            if x is None:
                raise InvalidMeasurement(f"the input of {call.name} was changed in place after the call")
            self._fired.add(call)
            self.counted.update(call.parameters.values())
            x, gy = x.movedim(call.dims[0], 0), gy.movedim(call.dims[1], 0)
            if x.is_floating_point():
                x = x.to(gy.dtype)
            late = {name for name, p in call.parameters.items() if self.keep_all or self._uses[p] > 1}
            if late:
                self.kept.append(KeptCall(call, x, gy, frozenset(late)))
            prompt = call.parameters.keys() - late
            self.delivered |= bool(prompt)
            if not prompt:
                return None
            if squares is None or late:
                squares = call.rule.square_norms(call.layer, x, gy, prompt)
        except Exception as error:  # a failing measurement must never harm the backward it rides on
            self.failure = error
            return None
        finally:
            self.seconds += time.perf_counter() - started + seconds
        return squares


def _is_recorded(module: nn.Module) -> bool:
    """Whether the module's forward is a recorder's."""
    forward = module.__dict__.get("forward")
    method = forward.func if isinstance(forward, partial) else None
    return isinstance(method, MethodType) and isinstance(method.__self__, Recorder)


def _in_backward() -> bool:
    """Whether autograd is running a backward in this thread, as activation checkpointing asks it too."""
    return torch._C._current_graph_task_id() != -1
