"""What the lines of run.jsonl hold: the run's start, each step, metrics from outside, the end. All plain values."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Decision, GradientStatistics, quotient
from adadagrad.version import __version__

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch

VERSION = 1
"""Version of the line format, written in the start record."""


def start_record(engine: AdaptiveBatch) -> dict[str, Any]:
    """Return the first line of a run: what was asked for, and on what.

    Args:
        engine: The engine, before its first step.

    Returns:
        Plain values by name.
    """
    return {
        "version": VERSION,
        "library": __version__,
        "torch": torch.__version__,
        "seed": engine.seed,
        "dataset_size": engine.dataset_size,
        "total_samples": engine.total_samples,
        "policy": repr(engine.policy),
        "bounds": repr(engine.bounds),
        "measure": repr(engine.measuring.settings) if engine.measuring.enabled else None,
        "estimator": repr(engine.measuring.estimator),
        "averaging": engine.measuring.averaging.over,
        "rate": None if engine.learning_rate.rule is None else repr(engine.learning_rate.rule),
        "base_batch_size": engine.learning_rate.base_batch_size,
        "optimizer": type(engine.optimizer).__name__,
        "ranks": engine.parallel.ranks.count,
        "parallel": type(engine.parallel).__name__,
        "parameters": sum(p.numel() for p in engine.model.parameters() if p.requires_grad),
        "global_batch_size": engine.global_batch_size,
        "min_batch_size": engine.min_batch_size,
        "max_batch_size": engine.max_batch_size,
        "micro_batch_size": engine.micro_batch_size,
        "samples_seen": engine.samples_seen,
        "time": time.time(),
    }


def step_record(
    decision: Decision, *, samples_drawn: int, threshold: float | None, own: GradientStatistics | None = None
) -> dict[str, Any]:
    """Return a step's line, without its times.

    Args:
        decision: The step's record.
        samples_drawn: Examples taken from the stream so far.
        threshold: Right side of the policy's test; None where it has none.
        own: What was measured in this very step, where the policy reads something else: an average, or nothing yet.

    Returns:
        Plain values by name.
    """
    observation, plan = decision.observation, decision.plan
    record: dict[str, Any] = {
        "step": decision.step,
        "samples_seen": decision.samples_seen,
        "samples_drawn": samples_drawn,
        "global_batch_size": observation.global_batch_size,
        "micro_batch_size": plan.micro_batch_size,
        "accumulation_steps": plan.accumulation_steps,
        "loss": observation.loss,
        "lr": decision.lr,
        "measured": observation.gradient is not None or own is not None,
        "requested": decision.requested,
        "next_global_batch_size": decision.next_plan.global_batch_size,
        "reason": decision.reason,
    }
    g = observation.gradient
    if g is not None:
        record |= {
            "estimator_kind": g.kind,
            "num_units": g.num_units,
            "grad_norm_sq": g.grad_norm_sq,
            "grad_norm_sq_error": g.grad_norm_sq_error,
            "variance_trace": g.variance_trace,
            "variance_trace_error": g.variance_trace_error,
            "inner_product_variance": g.inner_product_variance,
            "coordinate_ratio": g.coordinate_ratio,
            "noise_scale": g.noise_scale,
            "relative_variance": _left_side(decision, threshold),
            "threshold": threshold,
            "requested_low": decision.requested_low,
            "requested_high": decision.requested_high,
        }
        record |= {"displaced": True} if g.displaced else {}
    if own is not None and own is not g:
        record |= {
            "step_grad_norm_sq": own.grad_norm_sq,
            "step_variance_trace": own.variance_trace,
            "loss_average": observation.loss_average,
        }
    return record


def rate_fields(engine: AdaptiveBatch) -> dict[str, float]:
    """Return what a learning-rate rule adds to a step's line.

    Args:
        engine: The engine, after the step.

    Returns:
        The factor that the rule put on this step's learning rate, and the progress after it; nothing without a rule.
    """
    rates = engine.learning_rate
    return {} if rates.rule is None else {"rate_factor": rates.factor, "progress": rates.progress}


def metrics_record(engine: AdaptiveBatch, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return a line of the user's own metrics.

    Args:
        engine: The engine, at the number of samples that the metrics are of.
        metrics: Numbers by name.

    Returns:
        Plain values by name.

    Raises:
        InvalidArgument: A metric is no number.
    """
    values = {name: _number(name, value) for name, value in metrics.items()}
    record = {"step": engine.steps, "samples_seen": engine.samples_seen, "metrics": values}
    return {**record, "seconds": engine.seconds}


def end_record(engine: AdaptiveBatch) -> dict[str, Any]:
    """Return the last line of a run that has used its budget.

    Args:
        engine: The engine, after its last step.

    Returns:
        Plain values by name.
    """
    return {
        "samples_seen": engine.samples_seen,
        "samples_drawn": engine.samples_drawn,
        "steps": engine.steps,
        "skipped": engine.skipped,
        "nonfinite_requests": engine.nonfinite_requests,
        "memory_retries": engine.memory_retries,
        **engine.parallel.log_fields(),
        **times(engine),
    }


def times(engine: AdaptiveBatch) -> dict[str, float]:
    """Return the clocks of a line of the log.

    Args:
        engine: The engine.

    Returns:
        Seconds inside steps so far, and those of them spent measuring.
    """
    return {"seconds": round(engine.seconds, 6), "measure_seconds": round(engine.measuring.instrument.seconds, 6)}


def _left_side(decision: Decision, threshold: float | None) -> float | None:
    """Return what the test compares with its threshold at this batch size; V / (b s) where there is no test."""
    g, b = decision.observation.gradient, decision.observation.global_batch_size
    if threshold is not None and decision.requested is not None and b:
        return threshold * decision.requested / b
    return None if g is None else quotient(g.variance_trace * g.mean_variance_factor, g.grad_norm_sq)


def _number(name: str, value: Any) -> float:
    """Return a metric as a float."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"metrics[{name!r}] must be a number, got {value!r:.80}: log one number for each name"
        ) from error
