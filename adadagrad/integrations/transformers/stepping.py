"""Trainer's loop over the engine's steps: what an item of its data is, and how one is trained on."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from adadagrad.integrations.transformers.following import Following
from adadagrad.integrations.transformers.loading import StepLoader
from adadagrad.integrations.transformers.rates import ShownRate
from adadagrad.integrations.transformers.refusing import step_of
from adadagrad.integrations.transformers.sizing import Sizes, sizes_of
from adadagrad.integrations.transformers.weighing import Weight, weigh


class SteppedTrainer(Trainer):
    """A Trainer to which every item of the training data is one whole optimizer step.

    With ``gradient_accumulation_steps=1`` Trainer clips, steps the optimizer, counts, logs, evaluates and saves after
    every item, whatever it holds; so all its arithmetic of windows, prefetching and skipping is out of the way.
    """

    args: TrainingArguments
    model: Any
    optimizer: Any
    lr_scheduler: Any

    _following: Following
    _settings: dict[str, Any]
    _total_samples: int | None
    _weight: Weight
    _accumulation: int
    _shifted: bool
    _loader: StepLoader | None = None
    _flops = 0.0

    def get_train_dataloader(self) -> Any:
        """Return a loader each of whose items is one optimizer step."""
        args = self.args
        if args.gradient_accumulation_steps != 1:
            self._accumulation, args.gradient_accumulation_steps = args.gradient_accumulation_steps, 1
        shuffle = vars(args).get("train_sampling_strategy") != "sequential"
        host = super().get_train_dataloader()
        self._loader = StepLoader(host, shuffle=shuffle, micro_batch_size=args.per_device_train_batch_size)
        return self._loader

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any, *others: Any) -> tuple[Any, ...]:
        """Return Trainer's counts, which bound nothing: the engine ends epochs and run. The last one is an estimate.

        Args:
            args: The training arguments.
            dataloader: The loader of steps.
            *others: What some versions of transformers pass besides.

        Returns:
            The numbers that Trainer's own method returns.
        """
        found = super().set_initial_training_values(args, dataloader, *others)
        examples, sizes = len(dataloader), self._sizes
        return (sys.maxsize, examples, examples, sizes.total, found[4], examples, sizes.steps)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Return what shows the engine's learning rate where Trainer expects a scheduler.

        Args:
            num_training_steps: Not used: the schedule counts examples.
            optimizer: The optimizer; None for the trainer's.
        """
        self.lr_scheduler = ShownRate(self.optimizer if optimizer is None else optimizer)
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run all micro-batches of a step.

        Args:
            model: The wrapped model.
            inputs: The item of the loader.
            num_items_in_batch: Not used: the engine counts what a step weighs.

        Returns:
            The step's mean loss over all processes.
        """
        step = self._following.step = step_of(inputs)
        assert self._loader is not None
        model.train()
        self.optimizer.train()  # which optimizers without a schedule need
        self._flops = 0.0
        while step.left:
            rows = step.open()
            batch = self._prepare_inputs(self._loader.collate(rows))
            self._flops += float(super().floating_point_ops(batch))
            weighed = weigh(batch, len(rows), shifted=self._shifted, weight=self._weight)
            items = None if self.compute_loss_func is None else weighed.items
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, weighed.inputs, num_items_in_batch=items)
            self.accelerator.backward(step.share(loss * weighed.total, weighed.weight))
            step.close()
        step.prepare()
        return torch.tensor(step.loss, device=self.args.device)

    def floating_point_ops(self, inputs: Any) -> Any:
        """Return the operations of a step, or of a batch.

        Args:
            inputs: An item of the loader, or a batch.
        """
        if isinstance(inputs, dict) and "step" in inputs:
            return self._flops
        return super().floating_point_ops(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and in training add the batch size, the examples seen and what was measured.

        Args:
            logs: The values.
            start_time: When training began.
        """
        logs.update(self._following.fields(logs))
        self._following.keep(logs)
        super().log(logs, start_time)

    @property
    def _sizes(self) -> Sizes:
        assert self._loader is not None
        return sizes_of(
            self.args,
            self._settings["policy"],
            accumulation=self._accumulation,
            examples=len(self._loader),
            total_samples=self._total_samples,
        )
