"""A run.jsonl becomes a `Run`: plain numbers in plain lists, whatever byte the run was cut at.

The format is one JSON object a line, its ``kind`` first. JSON has no NaN or infinity, so those are the
strings ``"nan"``, ``"inf"`` and ``"-inf"``. Kinds that this version does not know are passed over.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adadagrad.core.errors import CorruptLog, InvalidData
from adadagrad.report.run import LogRow, Run, StepRow

LOG_NAME = "run.jsonl"
CONFIG_NAME = "config.toml"


def find_logs(path: str | Path) -> list[Path]:
    """Find the logs at a path: a log file, a run directory, or a directory that holds run directories.

    Args:
        path: Where to look.

    Returns:
        At least one path to an existing log; those of several runs in the order in which they started.

    Raises:
        InvalidData: There is no log.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if (path / LOG_NAME).is_file():
        return [path / LOG_NAME]
    inside = sorted(path.glob(f"*/{LOG_NAME}"), key=lambda log: (_start_time(log), log))
    if not inside:
        missing = "does not exist" if not path.exists() else f"holds no {LOG_NAME}"
        raise InvalidData(f"{path} {missing}: give a run directory, one that holds runs, or a {LOG_NAME}")
    return inside


def read_runs(paths: Sequence[str | Path], left_out: list[CorruptLog] | None = None) -> list[Run]:
    """Read every run at several paths and make their names tell them apart.

    Args:
        paths: Each as for `find_logs`.
        left_out: A list that takes what is wrong with each log that cannot be read, so that it does not keep the other
            runs from being reported; None raises the first such error, as does a lack of any readable log.

    Returns:
        At least one run, each log once; those that share a directory name are called by their parent's name as well.

    Raises:
        InvalidData: There is no path, or no log at one of them.
        CorruptLog: A log is broken and `left_out` is None, or all of them are.
    """
    if not paths:
        raise InvalidData("no run given: name at least one run directory")
    logs = list({log.resolve(): log for path in paths for log in find_logs(path)}.values())
    runs, broken = {}, []
    for log in logs:
        try:
            runs[log] = read_run(log)
        except CorruptLog as error:
            broken.append(error)
    if broken and (left_out is None or not runs):
        raise broken[0]
    if left_out is not None:
        left_out.extend(broken)
    shared = {name for name, count in Counter(run.name for run in runs.values()).items() if count > 1}
    return [
        replace(run, name=f"{log.resolve().parent.parent.name}/{run.name}") if run.name in shared else run
        for log, run in runs.items()
    ]


def read_run(path: str | Path) -> Run:
    """Read one run; an unfinished last line, which a killed run leaves, is passed over.

    Where a log holds several start records, the last one counts: what was written before it for the same samples is
    replaced by what follows it.

    Args:
        path: A run directory or its log file.

    Returns:
        The run.

    Raises:
        InvalidData: There is no log at `path`.
        CorruptLog: A line other than an unfinished last one is not a record; the message names file and line.
    """
    log = Path(path)
    if log.is_dir():
        log /= LOG_NAME
    if not log.is_file():
        raise InvalidData(f"{log} does not exist: give a run directory or its {LOG_NAME}")
    start: Mapping[str, Any] | None = None
    end: Mapping[str, Any] | None = None
    steps: list[StepRow] = []
    logs: list[LogRow] = []
    skips: list[int] = []
    for number, record in _records(log):
        where = f"{log}, line {number}"
        kind = record["kind"]
        if start is None and kind != "start":
            raise CorruptLog(f"{where}: a run begins with a start record, got {kind!r}")
        try:
            if kind == "start":
                resumed_at = int(record.get("samples_seen", 0))
                steps = [row for row in steps if row.samples_seen <= resumed_at]
                logs = [row for row in logs if row.samples_seen <= resumed_at]
                skips = [seen for seen in skips if seen <= resumed_at]
                start, end = record, None
            elif kind == "step":
                steps.append(_step_row(record))
            elif kind == "log":
                logs.append(_log_row(record))
            elif kind == "skip":
                skips.append(int(record.get("samples_seen", steps[-1].samples_seen if steps else 0)))
            elif kind == "end":
                end = record
        except KeyError as error:
            raise CorruptLog(f"{where}: the {kind} record has no {error.args[0]!r}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise CorruptLog(f"{where}: the {kind} record holds a wrong value: {error}") from error
    if start is None:
        raise CorruptLog(f"{log}, line 1: no start record; the run was stopped before it wrote anything")
    beside = log.with_name(CONFIG_NAME)
    config = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else None
    name = log.resolve().parent.name if log.name == LOG_NAME else log.stem
    return Run(name=name, start=start, steps=steps, logs=logs, skipped=len(skips), end=end, config=config)


def _records(log: Path) -> list[tuple[int, dict[str, Any]]]:
    """Parse every line; only a last line without its newline may be broken."""
    lines = log.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
                raise ValueError("not an object with a kind")
        except ValueError as error:
            if number == len(lines):
                break
            raise CorruptLog(f"{log}, line {number}: not a record ({error})") from error
        records.append((number, record))
    return records


def _step_row(record: Mapping[str, Any]) -> StepRow:
    return StepRow(
        step=int(record["step"]),
        samples_seen=int(record["samples_seen"]),
        global_batch_size=int(record["global_batch_size"]),
        seconds=float(record["seconds"]),
        loss=_optional(record, "loss"),
        lr=_optional(record, "lr"),
        noise_scale=_optional(record, "noise_scale"),
        relative_variance=_optional(record, "relative_variance"),
        threshold=_optional(record, "threshold"),
        measure_seconds=_optional(record, "measure_seconds"),
        requested_low=_optional(record, "requested_low"),
        requested_high=_optional(record, "requested_high"),
        grad_norm_sq=_of_this_step(record, "grad_norm_sq"),
        variance_trace=_of_this_step(record, "variance_trace"),
        inner_product_variance=_optional(record, "inner_product_variance"),
        reason=str(record.get("reason", "")),
    )


def _log_row(record: Mapping[str, Any]) -> LogRow:
    return LogRow(
        samples_seen=int(record["samples_seen"]),
        step=int(record["step"]),
        seconds=float(record["seconds"]),
        metrics={name: float(value) for name, value in dict(record["metrics"]).items() if _is_number(value)},
    )


def _optional(record: Mapping[str, Any], key: str) -> float | None:
    """A number, None where it is absent or null; float() reads the strings that stand for NaN and infinity."""
    value = record.get(key)
    return None if value is None else float(value)


def _of_this_step(record: Mapping[str, Any], key: str) -> float | None:
    """A statistic of the step alone: where the policy was given an average over steps, the log holds both."""
    own = _optional(record, f"step_{key}")
    return _optional(record, key) if own is None else own


def _is_number(value: object) -> bool:
    """Whether a metric can be plotted; a script may also log words, which the report leaves out."""
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")


def _start_time(log: Path) -> float:
    """When a run began; 0 where the log does not say, so that a broken one is reported when it is read."""
    with log.open("rb") as file:
        try:
            return float(json.loads(file.readline()).get("time", 0))
        except (ValueError, TypeError, AttributeError):
            return 0.0
