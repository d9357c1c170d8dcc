"""What the report knows of a run: its steps, its logged metrics, how it began and ended. Plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CUT = "short batch"
"""The reason of a step that the end of the budget, or of an epoch, has cut short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One applied optimizer step.

    Args:
        step: Its number, from 1.
        samples_seen: Examples whose update has been applied, this step included.
        global_batch_size: Examples in this step.
        seconds: Training time so far, evaluation left out.
        loss: Mean loss of the step, None where it was not recorded.
        lr: Learning rate of the first parameter group.
        noise_scale: Estimated gradient noise scale in examples, None on a step that was not measured.
        relative_variance: Left side of the test at this batch size, V / (b s) for the norm test without corrections;
            None on a step that was not measured.
        threshold: Right side of the test, None where the policy has no such number.
        measure_seconds: Time spent measuring so far.
        requested_low: Lower end of what the policy might have asked for, None where it is not known.
        requested_high: Upper end; may be infinite.
        grad_norm_sq: s, squared norm of this step's gradient, None on a step that was not measured [grad^2].
        variance_trace: V of this step [grad^2].
        inner_product_variance: V_p of this step [grad^4], None where it was not measured.
        reason: What happened to the batch size.
    """

    step: int
    samples_seen: int
    global_batch_size: int
    seconds: float
    loss: float | None = None
    lr: float | None = None
    noise_scale: float | None = None
    relative_variance: float | None = None
    threshold: float | None = None
    measure_seconds: float | None = None
    requested_low: float | None = None
    requested_high: float | None = None
    grad_norm_sq: float | None = None
    variance_trace: float | None = None
    inner_product_variance: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRow:
    """What the training script logged at one moment: its metrics, and where in the run that was."""

    samples_seen: int
    step: int
    seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run as its log tells it.

    Args:
        name: The run directory's name.
        start: The first record: policy, optimizer, data set size and so on.
        steps: The applied steps in order.
        logs: The logged metrics in order.
        skipped: How many updates were skipped.
        end: The last record, None where the run was stopped before its end.
        config: The text of the configuration file beside the log, None where there is none.
    """

    name: str
    start: Mapping[str, Any]
    steps: list[StepRow] = field(default_factory=list)
    logs: list[LogRow] = field(default_factory=list)
    skipped: int = 0
    end: Mapping[str, Any] | None = None
    config: str | None = None

    @property
    def total_samples(self) -> int | None:
        """The budget in samples, None where the log does not say."""
        total = self.start.get("total_samples")
        return int(total) if isinstance(total, int | float) else None

    @property
    def counts_progress(self) -> bool:
        """Whether the budget counts the progress of a learning-rate rule, so that samples seen differ from it."""
        return "progress_in='scale_invariant'" in str(self.start.get("rate"))

    def series(self, metric: str) -> list[tuple[LogRow, float]]:
        """Collect one metric's finite values in order.

        Args:
            metric: Its name, for example ``"val/accuracy"``.

        Returns:
            The log row and the value, for each row that has the metric.
        """
        rows = [(row, row.metrics[metric]) for row in self.logs if metric in row.metrics]
        return [(row, value) for row, value in rows if math.isfinite(value)]


def accuracy_metric(runs: Sequence[Run]) -> str | None:
    """Choose the metric that the report calls accuracy: on validation data first, then on test data.

    Args:
        runs: The runs to compare.

    Returns:
        The metric's name, None where no run logged an accuracy.
    """
    names = {name for run in runs for row in run.logs for name, value in row.metrics.items() if math.isfinite(value)}
    found = sorted(name for name in names if name.rsplit("/")[-1] == "accuracy")
    for preferred in ("val/accuracy", "test/accuracy"):
        if preferred in found:
            return preferred
    return found[0] if found else None


def metric_title(metric: str) -> str:
    """Say a metric's name in words.

    Args:
        metric: Its name in the log.

    Returns:
        The words.

    Example:
        >>> metric_title("val/accuracy"), metric_title("test/accuracy")
        ('validation accuracy', 'test accuracy')
    """
    words = {"val": "validation", "train": "training"}
    return " ".join(words.get(part, part) for part in metric.split("/"))
