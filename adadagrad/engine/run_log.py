"""run.jsonl: one record a line, flushed line by line, so that a killed run stays readable."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.records import Decision, quotient
from adadagrad.version import __version__

if TYPE_CHECKING:
    from adadagrad.engine.adaptive_batch import AdaptiveBatch

_ENCODER = json.JSONEncoder(allow_nan=False)

VERSION = 1
"""Version of the line format, written in the start record."""


class RunLog:
    """Appends records to ``run.jsonl`` of a run directory; without a directory it does nothing.

    NaN and infinities are written as the strings ``"nan"``, ``"inf"``, ``"-inf"``, which JSON lacks.

    Args:
        directory: The run directory, created if it does not exist; None for no log.

    Raises:
        InvalidArgument: `log_dir` cannot be created or written in. Found out here, not when a step has been trained.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.path: Path | None = None
        self._file: IO[bytes] | None = None
        if directory is None:
            return
        try:
            self.path = Path(directory) / "run.jsonl"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self.path.open("a").close()
            tempfile.TemporaryFile(dir=self.path.parent).close()  # permissions do not tell all: try it
        except (OSError, TypeError) as error:
            raise InvalidArgument(
                f"log_dir must be a directory that can be written in, got {str(directory)!r} ({error}): choose another "
                "one, or None for no log"
            ) from error

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """Append one line.

        Args:
            kind: What the line is: ``"start"``, ``"step"``, ``"skip"``, ``"log"`` or ``"end"``.
            record: Plain values.
        """
        if self.path is None:
            return
        if self._file is None:
            self._file = self.path.open("ab")
        line = {"kind": kind, **record}
        try:
            text = _ENCODER.encode(line)
        except ValueError:
            text = _ENCODER.encode(_without_nan(line))
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def refuse_other(self, state: Mapping[str, Any] | None = None) -> None:
        """Refuse to write behind, or over, the records of another run.

        Args:
            state: What `state_dict` returned in the run to continue; None for a new run.

        Raises:
            InvalidArgument: `log_dir` holds a log that does not begin as the state's does.
        """
        if self.position > 0 and (state is None or state["first_line"] != self._first_line()):
            raise InvalidArgument(
                f"log_dir holds the log of another run, {self.path}: choose an empty directory, or continue that run "
                "with engine.load(...) from a checkpoint of its own"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return how long the log is [bytes], and what tells it from others: a checksum of its first line."""
        return {"position": self.position, "first_line": self._first_line()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Drop what was written after a checkpoint, so that the resumed run's records follow on it.

        Args:
            state: What `state_dict` returned when the checkpoint was made.

        Raises:
            InvalidArgument: `log_dir` holds the log of another run, of which nothing is dropped.
        """
        self.refuse_other(state)
        self.close()
        if self.path is not None and self.position > state["position"]:
            os.truncate(self.path, state["position"])

    def _first_line(self) -> int | None:
        """Return the checksum of the start record, which holds the time; None for an empty log."""
        if self.path is None or self.position == 0:
            return None
        with self.path.open("rb") as file:
            return zlib.crc32(file.readline())

    def close(self) -> None:
        """Close the file; a later record opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


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
        "optimizer": type(engine.optimizer).__name__,
        "parameters": sum(p.numel() for p in engine.model.parameters() if p.requires_grad),
        "global_batch_size": engine.global_batch_size,
        "max_batch_size": engine.max_batch_size,
        "micro_batch_size": engine.micro_batch_size,
        "samples_seen": engine.samples_seen,
        "time": time.time(),
    }


def step_record(decision: Decision, *, samples_drawn: int, threshold: float | None) -> dict[str, Any]:
    """Return a step's line, without its times.

    Args:
        decision: The step's record.
        samples_drawn: Examples taken from the stream so far.
        threshold: Right side of the policy's test; None where it has none.

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
        "measured": observation.gradient is not None,
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
            "variance_trace": g.variance_trace,
            "variance_trace_error": g.variance_trace_error,
            "inner_product_variance": g.inner_product_variance,
            "coordinate_ratio": g.coordinate_ratio,
            "noise_scale": g.noise_scale,
            "relative_variance": _left_side(decision, threshold),
            "threshold": threshold,
        }
    return record


def _left_side(decision: Decision, threshold: float | None) -> float | None:
    """Return what the test compares with its threshold at this batch size; V / (b s) where there is no test."""
    g, b = decision.observation.gradient, decision.observation.global_batch_size
    if threshold is not None and decision.requested is not None and b:
        return threshold * decision.requested / b
    return None if g is None else quotient(g.variance_trace * g.mean_variance_factor, g.grad_norm_sq)


def _without_nan(value: Any) -> Any:
    """Return the value with every float that JSON lacks as a word."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
