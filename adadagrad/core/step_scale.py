"""`StepScale`: how large a step is beside the base batch, and where in the run it stands. Plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScale:
    """What a learning-rate rule may look at, beside what was measured.

    Args:
        global_batch_size: b, examples that the step averages, over all ranks.
        base_batch_size: b_0, examples for which the optimizer's own learning rate was chosen.
        progress: Where the run stands at the start of the step [examples]: those seen, or what the rule counts in
            their place.
        dataset_size: N, examples in the data set.

    Example:
        >>> StepScale(global_batch_size=96, base_batch_size=64).scale
        1.5
    """

    global_batch_size: int
    base_batch_size: int
    progress: float = 0.0
    dataset_size: int = 1

    @property
    def scale(self) -> float:
        """How many base batches the step averages, s = b / b_0; not always whole, below 1 for a smaller batch."""
        return self.global_batch_size / self.base_batch_size
