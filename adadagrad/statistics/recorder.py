"""One measured micro-batch: taps on every layer that has a rule, and what they delivered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adadagrad.core.errors import AdadagradError, InvalidMeasurement
from adadagrad.statistics.fallback import ModelCall
from adadagrad.statistics.layout import Layout
from adadagrad.statistics.rules import AbstractRule, find_rule
from adadagrad.statistics.rules.base import own_parameters
from adadagrad.statistics.taps import Forward, Tap


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One call of a layer whose examples are known.

    Args:
        layer: The module.
        rule: Its rule.
        parameters: Its trainable parameters that rules count, by their name in the layer.
        dims: Batch dimensions of input and output.
    """

    layer: nn.Module
    rule: AbstractRule[Any]
    parameters: dict[str, nn.Parameter]
    dims: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class KeptCall:
    """A layer call with its input and output gradient, kept until they are no longer needed.

    Args:
        call: The layer call.
        x: Input, examples first (n, ...).
        gy: Output gradient, examples first (n, ...).
        names: The parameters whose squares have not been delivered through the leaf.
    """

    call: LayerCall
    x: Tensor
    gy: Tensor
    names: frozenset[str]


class Recorder:
    """Patched forwards of one micro-batch, and everything they found.

    Args:
        model: The model.
        layout: Where the examples are; calibrated here at the model's first call.
        num_examples: n, or None to read it off the model's first tensor argument.
        excluded: Parameters that the fallback counts.
        keep_all: Keep every call's tensors, for inner products, coordinates or verification, and deliver
            nothing through the leaf.
        watch_model: Also keep the model's arguments and output gradients, for the fallback.
        calibrate: Make the trial runs if they have not been made.
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
    ) -> None:
        self.model, self.layout, self.n = model, layout, num_examples
        self.excluded, self.keep_all, self.watch_model, self.calibrate = excluded, keep_all, watch_model, calibrate
        self.leaf: Tensor | None = None
        self.kept: list[KeptCall] = []
        self.model_calls: list[ModelCall] = []
        self.shared: set[nn.Parameter] = set()  # in a call without a batch dimension
        self.counted: set[nn.Parameter] = set()  # delivered or kept
        self.failure: Exception | None = None
        self.seconds = 0.0  # spent in taps and trial runs
        self._uses: Counter[nn.Parameter] = Counter()  # calls per parameter in this micro-batch
        self._calls: Counter[str] = Counter()  # calls per module in one forward of the model
        self._fired: set[LayerCall] = set()
        self._trial = False
        self._open = True

    def forwards(self) -> dict[nn.Module, Forward]:
        """Return the replacement forward of every layer with a rule, and of the model itself."""
        found: dict[nn.Module, Forward] = {}
        for name, module in self.model.named_modules():
            rule = find_rule(module)
            if rule is not None and own_parameters(module):
                found[module] = partial(self._layer_forward, name, module, module.forward, rule)
        found[self.model] = partial(self._model_forward, found.get(self.model, self.model.forward))
        return found

    def close(self) -> None:
        """Stop listening: graphs that outlive the micro-batch deliver nothing."""
        self._open = False

    def _model_forward(self, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or self.failure is not None:
            return inner(*args, **kwargs)
        self._prepare(args, kwargs)
        if self.failure is None and self.calibrate and not self.layout.calibrated:
            self._trial, started = True, time.perf_counter()
            try:
                self.layout.calibrate(self.model, partial(self._counting_anew, inner), args, kwargs, self.n or 0)
            except AdadagradError as error:
                self.failure = error
            finally:
                self._trial, self.seconds = False, self.seconds + time.perf_counter() - started
        output = self._counting_anew(inner, *args, **kwargs)
        if self.watch_model:
            call = ModelCall(args, kwargs)
            call.watch(output)
            self.model_calls.append(call)
        return output

    def _counting_anew(self, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        self._calls.clear()
        return inner(*args, **kwargs)

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
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        y = inner(*args, **kwargs)
        key = (name, self._calls[name])
        self._calls[name] += 1
        x = args[0] if args else kwargs.get("input")
        if self._trial:
            if isinstance(x, Tensor):
                self.layout.note(key, layer, x, y)
            return y
        if not torch.is_grad_enabled() or not y.requires_grad or self.failure is not None:
            return y
        if self.leaf is None or not isinstance(x, Tensor):
            return y
        parameters = {k: p for k, p in own_parameters(layer).items() if p not in self.excluded}
        self._uses.update(parameters.values())
        try:
            dims = self.layout.batch_dims(key, x, y, len(self.leaf))
        except KeyError:
            self.layout.calibrated = False  # the model took a path that the trial runs did not see: look again
            self.failure = InvalidMeasurement("the model's forward took a path that has not been seen before")
            return y
        if dims is None:
            self.shared.update(parameters.values())
            return y
        call = LayerCall(layer, rule, parameters, dims)
        tapped: Tensor = Tap.apply(y, x.detach(), self.leaf, partial(self._collect, call))  # type: ignore[no-untyped-call]
        return tapped

    def _collect(self, call: LayerCall, x: Tensor, gy: Tensor) -> Tensor | None:
        """Take in one call's output gradient during the backward; return its squares, or None if kept."""
        if not self._open or self.failure is not None:
            return None
        started = time.perf_counter()
        try:
            if call in self._fired:
                raise InvalidMeasurement("several backward passes ran through one forward: add the losses first")
            self._fired.add(call)
            self.counted.update(call.parameters.values())
            x, gy = x.movedim(call.dims[0], 0), gy.movedim(call.dims[1], 0)
            if x.is_floating_point():
                x = x.to(gy.dtype)
            late = {name for name, p in call.parameters.items() if self.keep_all or self._uses[p] > 1}
            if late or self.keep_all:
                self.kept.append(KeptCall(call, x, gy, frozenset(late)))
            prompt = call.parameters.keys() - late
            squares: Tensor | None = call.rule.square_norms(call.layer, x, gy, prompt) if prompt else None
        except Exception as error:  # a failing measurement must never harm the backward it rides on
            self.failure = error
            return None
        finally:
            self.seconds += time.perf_counter() - started
        return squares
