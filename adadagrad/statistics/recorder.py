"""One measured micro-batch: the patched forward of the model, around the taps of its layers."""

from __future__ import annotations

import time
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adadagrad.core.errors import AdadagradError, InvalidMeasurement, StepError
from adadagrad.core.vectors import refuse_sparse
from adadagrad.statistics.calibration import Calibration
from adadagrad.statistics.calls import NESTED, SEVERAL_BACKWARDS, in_backward
from adadagrad.statistics.compiled import EagerUntilCalled
from adadagrad.statistics.fallback import ModelCall
from adadagrad.statistics.forward_state import ForwardState
from adadagrad.statistics.intake import Intake
from adadagrad.statistics.layer_taps import LayerTaps
from adadagrad.statistics.layout import Layout
from adadagrad.statistics.rules import find_fused
from adadagrad.statistics.rules.base import own_parameters
from adadagrad.statistics.shared import SharedTensors
from adadagrad.statistics.survey import Survey
from adadagrad.statistics.taps import Forward
from adadagrad.statistics.whole_forwards import WholeForwards


class Recorder:
    """Patched forwards of one micro-batch, and everything they found.

    Args:
        model: The model.
        survey: What it is made of now.
        layout: Where the examples are; calibrated here at the model's first call.
        num_examples: n, or None to read it off the model's first tensor argument.
        excluded: Parameters that the fallback counts.
        keep: Keep every call's tensors; see `Intake`.
        square: Add up squared coordinates on the way; see `Intake`.
        verify: Deliver nothing before all calls are known; see `Intake`.
        watch_model: Also keep the model's arguments and output gradients, for the fallback.
        calibrate: Make the trial runs if they have not been made.
        fuse: Form weight gradients example by example where a fused rule suits.
        trials: Whether to make the trial runs, where all ranks have agreed on it because a forward needs them all; the
            parameters are then sharded. None goes by the layout.
    """

    def __init__(
        self,
        model: nn.Module,
        survey: Survey,
        layout: Layout,
        num_examples: int | None,
        excluded: set[nn.Parameter],
        *,
        keep: bool,
        square: bool,
        verify: bool,
        watch_model: bool,
        calibrate: bool,
        fuse: bool,
        trials: bool | None = None,
    ) -> None:
        self.intake = Intake(keep=keep, square=square, verify=verify)
        """What the backward brought."""
        self.model_calls: list[ModelCall] = []
        self.entrance = EagerUntilCalled()
        """Holds compiled code around the model back until its forward begins."""
        self._model, self._survey, self._layout, self._n = model, survey, layout, num_examples
        self._watch_model, self._calibrate, self._fuse = watch_model, calibrate, fuse
        self._trials, self._sharded = trials, trials is not None
        self._raw = {p: key for p, key in survey.raw.items() if p not in excluded and not self._sharded}
        self._tensors = SharedTensors({} if self._sharded else layout.meetings, self._raw, self.intake.fail)
        self._state = ForwardState()
        self._layers = LayerTaps(self._state, layout, self._tensors, self.intake, excluded, sharded=self._sharded)
        self._whole = WholeForwards(self._state, layout, self.intake, survey.raw, excluded)

    @property
    def leaf(self) -> Tensor | None:
        """The dummy leaf, float64 (n,); None where the model was not called."""
        return self._state.leaf

    @property
    def shared(self) -> set[nn.Parameter]:
        """Parameters in a call whose examples are not known."""
        return self._state.shared

    def forwards(self) -> dict[nn.Module, Forward]:
        """Return the replacement forward of every layer with a rule, and of the model itself.

        Raises:
            StepError: A module is being measured already.
        """
        for name, module in self._survey.replaced:
            if _is_recorded(module):
                raise StepError(
                    f"{name or 'the model'} is being measured already: leave that measurement before another one starts"
                )
        found: dict[nn.Module, Forward] = {}
        for name, module, rule in self._survey.layers:
            fused = find_fused(module) if self._fuse else None
            if fused is not None or self._sharded:
                self._layers.own[name] = own_parameters(module)
            found[module] = partial(self._layers.forward, name, module, module.forward, rule, fused)
        for name, module, whole in () if self._sharded else self._survey.whole:
            found[module] = partial(self._whole.forward, name, module, module.forward, whole)
        found[self._model] = partial(self._forward, found.get(self._model, self._model.forward))
        return found

    def close(self) -> None:
        """Stop listening: graphs that outlive the micro-batch deliver nothing."""
        self.intake.close()
        self._tensors.close()

    def gather(self) -> None:
        """Count what came to shared tensors, once the backward is over."""
        for entry in self._tensors.kept_calls(self._model):
            self.intake.keep(entry)

    def check(self, changed: set[nn.Parameter]) -> None:
        """Refuse a micro-batch whose backward did not go through the whole model into `.grad`.

        Args:
            changed: The parameters that received a gradient.

        Raises:
            Exception: Whatever has failed since the forward.
            InvalidMeasurement: Forward or backward are missing, or the backward left something out.
        """
        if self.intake.failure is not None:
            raise self.intake.failure
        if self.leaf is None:
            raise InvalidMeasurement("the model itself was not called inside the measurement; call model(...)")
        if not changed:
            raise InvalidMeasurement(
                "no backward ran inside the measurement, or it added to no .grad: call loss.backward() there, and let "
                "the optimizer step after it"
            )
        for p in changed:
            refuse_sparse(cast(Tensor, p.grad))
        lost = [name for name, p in self._survey.parameters.items() if p in self.intake.counted - changed]
        if lost or (self.intake.delivered and self.leaf.grad is None):
            raise InvalidMeasurement(
                f"the backward left out {', '.join(lost) or 'the measurement'}: call loss.backward() without inputs="
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward(self, inner: Forward, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output; what replaces its forward."""
        self.entrance.release()
        if not torch.is_grad_enabled() or self.intake.failure is not None:
            return self._state.run(inner, args, kwargs)
        if self.intake.started and not in_backward():
            self.intake.fail(InvalidMeasurement(SEVERAL_BACKWARDS))
            return inner(*args, **kwargs)
        self._prepare(args, kwargs)
        if self._n is not None and self.intake.failure is None and self._trials_due(self._n):
            self._make_trials(inner, args, kwargs, self._n)
        output = self._state.run(inner, args, kwargs)
        if self._n is not None and self.intake.failure is None:
            self.shared.update(self._tensors.listen(output, self._n, self._whole.taken))
        if self._watch_model:
            call = ModelCall.now(args, kwargs)
            output = call.watch(output)
            self.model_calls.append(call)
        return output

    def _prepare(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Make the leaf at the model's first call, when n is known."""
        simple = not kwargs and all(isinstance(argument, Tensor) for argument in args)
        leaves = args if simple else tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if any(t.is_nested for t in tensors):
            self.intake.fail(InvalidMeasurement(NESTED))
            return
        if self._n is None and tensors:
            self._n = tensors[0].shape[0]
        if self._n is None or not any(t.shape[0] == self._n for t in tensors):
            self.intake.fail(
                InvalidMeasurement(
                    f"no tensor argument of the model has the {self._n} examples in its first dimension; pass the "
                    "batch to the model as a tensor with the examples first, or use estimator=MicroBatch()"
                )
            )
        elif self.leaf is None:
            device = next((p.device for p in self._survey.parameters.values()), torch.device("cpu"))
            self._state.leaf = torch.zeros(self._n, dtype=torch.float64, device=device, requires_grad=True)

    def _trials_due(self, n: int) -> bool:
        if self._trials is None:
            return self._calibrate and self._layout.due(n)
        due, self._trials = self._trials, False
        return due

    def _make_trials(self, inner: Forward, args: Any, kwargs: dict[str, Any], n: int) -> None:
        """Find where the examples are, before the forward that is measured."""
        started = time.perf_counter()
        try:
            calibration = Calibration(self._model, self._layout, aligned=self._sharded)
            with self._state.trials(calibration):
                calibration.run(partial(self._trial, inner), args, kwargs, n, self._raw)
        except AdadagradError as error:
            self.intake.fail(error)
        self.intake.seconds += time.perf_counter() - started

    def _trial(self, inner: Forward, rows: int, args: Any, kwargs: dict[str, Any]) -> Any:
        with self._state.trial(rows):
            return self._state.run(inner, args, kwargs)


def _is_recorded(module: nn.Module) -> bool:
    """Whether the module's forward is one of a measurement in progress."""
    forward = module.__dict__.get("forward")
    method = forward.func if isinstance(forward, partial) else None
    return isinstance(method, MethodType) and isinstance(method.__self__, Recorder | LayerTaps | WholeForwards)
