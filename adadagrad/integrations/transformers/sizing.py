"""What the training arguments mean in examples: the first batch, and the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from adadagrad.core.protocols import BatchSizePolicy
from adadagrad.core.records import Observation


@dataclass(frozen=True, slots=True)
class Sizes:
    """A run's sizes in examples.

    Args:
        micro: Most examples in one forward.
        first: Examples of the first step, over all processes.
        total: The budget.
    """

    micro: int
    first: int
    total: int

    @property
    def steps(self) -> int:
        """How many steps the budget takes if the batch stays as it is at first."""
        return math.ceil(self.total / self.first)


def sizes_of(
    args: TrainingArguments, policy: BatchSizePolicy, *, accumulation: int, examples: int, total_samples: int | None
) -> Sizes:
    """Return what training arguments mean in examples.

    Args:
        args: The arguments.
        policy: A schedule says itself where it starts; a test starts at the arguments' batch.
        accumulation: The user's ``gradient_accumulation_steps``.
        examples: In the data set.
        total_samples: The budget, in the place of the arguments' steps or epochs.

    Returns:
        The sizes.
    """
    named = args.per_device_train_batch_size * accumulation * args.world_size
    first = named if policy.needs else math.ceil(policy.required_batch_size(Observation(global_batch_size=named)))
    total = total_samples
    if total is None:
        total = args.max_steps * first if args.max_steps > 0 else max(1, round(args.num_train_epochs * examples))
    return Sizes(args.per_device_train_batch_size, first, total)
