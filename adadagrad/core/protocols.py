"""The small interfaces between layers: who must offer what, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.core.step_scale import StepScale


class BatchSizePolicy(Protocol):
    """Anything that answers "how many examples next?"; `adadagrad.policies.base.AbstractPolicy` is one."""

    needs: ClassVar[frozenset[str]]
    """Names of the `GradientStatistics` fields that it reads; empty for a schedule, which costs nothing."""

    monotone: ClassVar[bool]
    """Whether the batch may only grow under this policy, where `Bounds.monotone` is None."""

    @property
    def coordinate_reduction(self) -> CoordinateReduction | None:
        """How V_j / g_j^2 is reduced over coordinates; None for a policy that does not read that ratio."""
        ...

    @property
    def threshold(self) -> float | None:
        """Right side of the test: it passes where threshold * requested / b does not exceed it. None without one."""
        ...

    @property
    def averaging(self) -> float | Literal["epoch"] | None:
        """Over which steps statistics are combined before it is asked; see `AbstractPolicy.averaging`."""
        ...

    def required_batch_size(self, observation: Observation) -> float:
        """Return the batch size asked for, in examples, neither rounded nor bounded."""
        ...


class LearningRateSchedule(Protocol):
    """A function of progress that gives the factor on every parameter group's initial learning rate."""

    def __call__(self, samples_seen: float, total_samples: float) -> float:
        """Return the factor at `samples_seen` of `total_samples`; dimensionless, >= 0."""
        ...


RateState = Mapping[str, float]
"""What a learning-rate rule remembers, by name; replaced, never changed in place."""


class LearningRateRule(Protocol):
    """Anything that answers "which factor on the learning rate for this batch?"; `AbstractRate` is one."""

    needs: ClassVar[frozenset[str]]
    """Names of the `GradientStatistics` fields that it reads; empty for a rule that measures nothing."""

    @property
    def base_batch_size(self) -> int | None:
        """The size b_0 for which the optimizer's learning rate was chosen; None is the first batch size of the run."""
        ...

    @property
    def counts_progress(self) -> bool:
        """Whether `progress` is something else than the examples of the step."""
        ...

    def start(self) -> RateState:
        """Return what it remembers before the first step."""
        ...

    def observe(self, state: RateState, statistics: GradientStatistics, step: StepScale) -> RateState:
        """Return the state once a step has been measured, before its update."""
        ...

    def factor(self, state: RateState, step: StepScale) -> float:
        """Return the factor on the schedule's learning rate for a step; dimensionless, >= 0."""
        ...

    def progress(self, state: RateState, step: StepScale) -> float:
        """Return the progress that a step makes, in examples."""
        ...

    def advance(self, state: RateState, step: StepScale) -> RateState:
        """Return the state once a step has been applied, measured or not."""
        ...


@runtime_checkable
class Accelerating(Protocol):
    """What the engine asks of an `accelerate.Accelerator`, all of it public there."""

    scaler: Any
    """The `torch.amp.GradScaler` of float16; None in other precisions."""

    @property
    def gradient_accumulation_steps(self) -> int:
        """Over how many micro-batches it accumulates by itself."""
        ...

    @property
    def distributed_type(self) -> Any:
        """An enumeration, the value of which names how a step runs on many devices: "NO", "MULTI_GPU", "FSDP", ..."""
        ...

    @property
    def is_fsdp2(self) -> bool:
        """Whether models are sharded by `fully_shard`."""
        ...

    @property
    def mixed_precision(self) -> str:
        """The precision of the forward: "no", "bf16", "fp16" or "fp8"."""
        ...

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and load the state of these with its own."""
        ...
