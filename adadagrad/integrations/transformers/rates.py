"""Trainer's learning-rate schedules as functions of the examples seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.protocols import LearningRateSchedule


def schedule_in_samples(
    args: TrainingArguments, *, lr: float, first_batch_size: int, total_samples: int
) -> LearningRateSchedule:
    """Return the schedule that the arguments name, for the engine.

    A number of steps in the arguments (``warmup_steps=100``, ``num_decay_steps``) means so many steps of the first
    batch, wherever the batch size goes. With a batch that never changes the rates are Trainer's own.

    Args:
        args: They name the schedule, its warm-up and its further arguments.
        lr: The initial learning rate, which some schedules need to end at an absolute one.
        first_batch_size: Examples of the first step.
        total_samples: The budget.

    Returns:
        From the examples seen, and the budget, to the factor on the initial rates.

    Raises:
        InvalidArgument: The schedule is no function of progress.
    """
    steps = math.ceil(total_samples / first_batch_size)
    further: Any = args.lr_scheduler_kwargs
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=further,
    )
    if not isinstance(scheduler, LambdaLR):
        raise InvalidArgument(
            f"lr_scheduler_type={args.lr_scheduler_type!r} is no function of the examples seen: use one such as "
            "'cosine' or 'linear'"
        )
    factor: Callable[[Any], float] = scheduler.lr_lambdas[0]

    def schedule(samples_seen: float, total_samples: float) -> float:
        return float(factor(samples_seen / first_batch_size))

    return schedule


class ShownRate:
    """Stands where Trainer expects its scheduler: it shows the engine's learning rate and changes nothing.

    Args:
        optimizer: The optimizer, whose initial rates are kept as torch's schedulers keep them, so that a second
            ``train()`` begins with them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        for group in optimizer.param_groups:
            if group.get("lr") is not None:
                group.setdefault("initial_lr", float(group["lr"]))

    def reset(self) -> float:
        """Set the initial learning rates, for an engine that begins; return the first group's, or 0 without one."""
        for group in self._optimizer.param_groups:
            if isinstance(group.get("lr"), Tensor):
                group["lr"].fill_(group["initial_lr"])
            elif "initial_lr" in group:
                group["lr"] = group["initial_lr"]
        return float(self._optimizer.param_groups[0].get("initial_lr", 0.0))

    def step(self) -> None:
        """Do nothing: the engine sets the rate when a step begins."""

    def get_last_lr(self) -> list[float]:
        """Return each group's present learning rate."""
        return [float(group["lr"]) for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: what the engine needs it saves itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing over.

        Args:
            state: Ignored.
        """
