"""The callback by which Trainer's own counts follow the engine: steps, epochs, the end, the progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ProgressCallback

from adadagrad.engine.adaptive_batch import AdaptiveBatch
from adadagrad.engine.step import Step
from adadagrad.integrations.metrics import decision_metrics

OWN = ("adadagrad/loss", "adadagrad/lr")
"""What Trainer logs itself, under names of its own."""


class Following(TrainerCallback):
    """Ends Trainer's epochs and its run where the engine's end, and keeps an estimate of the steps to come.

    Args:
        begin: Makes the run's engine, once Trainer has made model and optimizer ready.
        handler: Trainer's callbacks, among which its progress bar is.
    """

    def __init__(self, begin: Callable[[], AdaptiveBatch], handler: CallbackHandler) -> None:
        self._begin, self._handler = begin, handler
        self.engine: AdaptiveBatch | None = None
        """The engine of the present or the last ``train()``."""
        self.step: Step | None = None
        """The step whose micro-batches have run."""
        self.running = False
        """Whether a run is under way."""
        self.samples_before = 0
        """Examples that had been seen when this ``train()`` began: those of the run that it goes on with."""
        self._epoch = 0
        self._metrics: dict[str, float] = {}  # of the last decision; the noise as last measured

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Make the engine, and estimate the steps to come.

        Args:
            args: Trainer's arguments.
            state: Its state.
            control: Its control.
            **others: Model, optimizer and so on.
        """
        self.step, self._metrics, self.running = None, {}, True
        engine = self.engine = self._begin()
        self.samples_before, self._epoch = engine.samples_seen, _epoch(engine)
        state.max_steps = state.global_step + _steps_left(engine)
        state.num_train_epochs = math.ceil(engine.total_samples / engine.dataset_size)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Complete the step that the optimizer has just made.

        Args:
            args: Trainer's arguments.
            state: Its state; the step is not counted yet.
            control: Its control.
            **others: Model, optimizer and so on.
        """
        assert self.engine is not None
        assert self.step is not None
        self._metrics |= decision_metrics(self.step.complete())
        state.max_steps = state.global_step + 1 + _steps_left(self.engine)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        """Set the epoch by the examples drawn, and end Trainer's where it is over.

        Args:
            args: Trainer's arguments.
            state: Its state.
            control: Its control.
            **others: Model, optimizer and so on.
        """
        engine = self.engine
        assert engine is not None
        state.epoch = engine.samples_drawn / engine.dataset_size
        if _epoch(engine) > self._epoch:
            self._epoch = _epoch(engine)
            control.should_epoch_stop = True
        for callback in self._handler.callbacks:
            bar: Any = callback.training_bar if isinstance(callback, ProgressCallback) else None
            if bar is not None:
                bar.total = state.max_steps

    def fields(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Return what a line of Trainer's log gets besides.

        Args:
            logs: The line.

        Returns:
            The examples seen; with a training loss also the batch sizes, and the noise as last measured; at the end
            the throughput, which Trainer reckons by steps.
        """
        if self.engine is None or not self.running:
            return {}
        found: dict[str, float] = {"adadagrad/samples_seen": self.engine.samples_seen}
        if "loss" in logs:
            found |= {name: value for name, value in self._metrics.items() if name not in OWN}
        if "train_runtime" in logs:
            trained = self.engine.samples_seen - self.samples_before
            found["train_samples_per_second"] = round(trained / max(logs["train_runtime"], 1e-9), 3)
        return found

    def keep(self, logs: Mapping[str, float]) -> None:
        """Write what an evaluation in training has found into the engine's own log.

        Args:
            logs: A line of Trainer's log.
        """
        found = {name: value for name, value in logs.items() if name.startswith("eval_")}
        if found and self.engine is not None and self.running:
            self.engine.log(found)


def _epoch(engine: AdaptiveBatch) -> int:
    """Return how many epochs have been drawn to their end."""
    return engine.samples_drawn // engine.dataset_size


def _steps_left(engine: AdaptiveBatch) -> int:
    """Return how many steps the rest of the budget takes if the batch stays as it is."""
    return math.ceil(max(0.0, engine.total_samples - engine.progress) / engine.global_batch_size)
