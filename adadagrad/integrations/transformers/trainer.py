"""`AdaptiveBatchTrainer`: Trainer, each of whose optimizer steps is one of the engine's."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Literal

from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from adadagrad.core.protocols import BatchSizePolicy, LearningRateRule
from adadagrad.core.settings import Bounds, Measure
from adadagrad.engine.adaptive_batch import AdaptiveBatch
from adadagrad.engine.arguments import check_settings
from adadagrad.integrations.transformers import checkpoints
from adadagrad.integrations.transformers.following import Following
from adadagrad.integrations.transformers.rates import schedule_in_samples
from adadagrad.integrations.transformers.refusing import refuse_arguments, refuse_settings, refuse_trainer
from adadagrad.integrations.transformers.stepping import SteppedTrainer
from adadagrad.integrations.transformers.weighing import Weight, shifts_labels


class AdaptiveBatchTrainer(SteppedTrainer):
    """Train with a batch size that each measured step may change; else as ``transformers.Trainer``.

    The first batch is the arguments' ``per_device_train_batch_size`` times ``gradient_accumulation_steps`` times the
    number of processes; ``per_device_train_batch_size`` stays the most that one forward sees. ``max_steps`` and
    ``num_train_epochs`` name a budget of examples: so many first batches, or so many times the data set. The learning
    rate follows ``lr_scheduler_type`` in examples; a number of steps in the arguments means steps of the first batch.
    (``logging_steps``, ``eval_steps`` and ``save_steps`` count optimizer steps.) The gradient is the mean over
    all valid labels of the step, over all processes.

    Args:
        *positional: As for ``Trainer``: model, training arguments, ...
        policy: What asks for batch sizes, for example ``NormTest(eta=0.5)``.
        measure: How, how often and on how many examples noise is measured.
        bounds: What may become of a requested size.
        rate: Which learning rate goes with the batch size, for example ``AdaScale()``.
        min_batch_size: Smallest batch that a policy may shrink to.
        max_batch_size: Largest batch.
        total_samples: The budget, in the place of the training arguments' steps or epochs.
        weight: ``"labels"`` weighs an example by its valid labels where these are classes (tokens), ``"examples"``
            weighs all alike; a function of the micro-batch returns its weight, or one for each example. The loss
            of a micro-batch must be a mean with these weights, as it is in transformers.
        epoch_boundary: ``"cross"`` lets a batch span two epochs, ``"short"`` cuts it at the end of the epoch.
        on_nonfinite: ``"skip"`` leaves out the update of a step whose loss or gradient is not finite, ``"stop"``
            raises.
        log_dir: Directory for ``run.jsonl``, which ``adadagrad report`` reads; None writes none.
        **named: As for ``Trainer``.

    Raises:
        InvalidArgument: An argument contradicts another one, or the training arguments ask for what cannot be right
            with a changing batch; the message names it.
        UnsizedDataset: The training data are iterable.
        OverriddenSampler: A sampler would be replaced by the engine's order.
        UnknownName: A word is none of those that an argument may be.
    """

    def __init__(
        self,
        *positional: Any,
        policy: BatchSizePolicy,
        measure: Measure | None = None,
        bounds: Bounds | None = None,
        rate: LearningRateRule | None = None,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        total_samples: int | None = None,
        weight: Weight = "labels",
        epoch_boundary: Literal["cross", "short"] = "cross",
        on_nonfinite: Literal["skip", "stop"] = "skip",
        log_dir: str | os.PathLike[str] | None = None,
        **named: Any,
    ) -> None:
        args = positional[1] if len(positional) > 1 else named.get("args")
        if args is not None:
            refuse_arguments(args)
        refuse_settings(policy, weight, total_samples, epoch_boundary=epoch_boundary, on_nonfinite=on_nonfinite)
        check_settings(bounds, measure, rate, None)
        super().__init__(*positional, **named)
        refuse_trainer(self)
        self.args: TrainingArguments = copy.copy(self.args)  # the user's own stay as they are
        self.args.ignore_data_skip = True  # the engine knows where it stands in the data
        self.args.average_tokens_across_devices = False  # the engine does, and a loss must stay a micro-batch's mean
        self._settings: dict[str, Any] = {
            "policy": policy,
            "measure": measure,
            "bounds": bounds,
            "rate": rate,
            "min_batch_size": min_batch_size,
            "max_batch_size": max_batch_size,
            "epoch_boundary": epoch_boundary,
            "on_nonfinite": on_nonfinite,
            "log_dir": log_dir,
        }
        self._weight, self._total_samples = weight, total_samples
        self._accumulation, self.args.gradient_accumulation_steps = self.args.gradient_accumulation_steps, 1
        self._following = Following(self._begin, self.callback_handler)
        self.callback_handler.callbacks.insert(0, self._following)
        self._resume_from: Path | None = None

    def train(
        self, resume_from_checkpoint: str | bool | os.PathLike[str] | None = None, *positional: Any, **named: Any
    ) -> TrainOutput:
        """Train until the budget of examples is used.

        Args:
            resume_from_checkpoint: As for ``Trainer``; True takes the newest whole checkpoint of ``output_dir``, and
                warns of newer ones that the end of a process has left incomplete.
            *positional: As for ``Trainer``.
            **named: As for ``Trainer``.

        Returns:
            What ``Trainer`` returns.

        Raises:
            CorruptCheckpoint: The checkpoint is not whole, or none is.
            InvalidArgument: It was saved by another trainer, or the engine's arguments contradict each other.
        """
        folder = checkpoints.to_resume(resume_from_checkpoint, Path(self.args.output_dir or "."))
        self._resume_from = folder
        try:
            found: TrainOutput = super().train(None if folder is None else str(folder), *positional, **named)
            return found
        finally:
            self._following.running = False
            if self._loader is not None:
                self._loader.finish()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save the engine's progress, then what Trainer saves."""
        engine = self._following.engine
        if engine is not None and not self.args.save_only_model:
            checkpoints.save_progress(
                engine, Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            )
        super()._save_checkpoint(model, trial)

    def _begin(self) -> AdaptiveBatch:
        """Make the engine of a run whose model and optimizer are ready, and put it where its checkpoint stood."""
        loader, sizes, args = self._loader, self._sizes, self.args
        assert loader is not None
        optimizer = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        lr = self.lr_scheduler.reset()
        self._shifted = shifts_labels(self.model)
        engine = AdaptiveBatch(
            self.model_wrapped,
            optimizer,
            loader.data,
            global_batch_size=sizes.first,
            micro_batch_size=sizes.micro,
            total_samples=sizes.total,
            lr_schedule=schedule_in_samples(args, lr=lr, first_batch_size=sizes.first, total_samples=sizes.total),
            seed=args.seed if args.data_seed is None else args.data_seed,
            **self._settings,
        )
        if self._resume_from is not None:
            checkpoints.load_progress(engine, self._resume_from)
        loader.start(engine)
        return engine
