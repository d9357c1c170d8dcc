"""For the tests of the trackers: a tracker that remembers, and what each library's own reader finds."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Rows = dict[str, list[tuple[float, float]]]
"""By name: pairs of x axis and value, in order."""


class Memory:
    """A tracker that keeps everything, and fails at one step where told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: list[tuple[int, int, dict[str, float]]] = []
        self.closed, self.fails_at = 0, fails_at

    def log(self, metrics: Mapping[str, float], *, samples_seen: int, step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server has gone")
        self.calls.append((step, samples_seen, dict(metrics)))

    def close(self) -> None:
        self.closed += 1


def tensorboard_rows(folder: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def wandb_records(folder: Path) -> list[Any]:
    """The records of an offline run: LevelDB's log of protobuf messages (7 bytes of header, blocks of 32 KiB)."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # old versions write the file out when their service ends
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_rows(folder: Path) -> Rows:
    rows: Rows = {}
    for record in wandb_records(folder):
        if record.HasField("history"):
            items = {item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
            for name, value in items.items():
                rows.setdefault(name, []).append((items["samples_seen"], value))
    return rows


def mlflow_rows(uri: str, run_id: str) -> Rows:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    return {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]
        for name in client.get_run(run_id).data.metrics
    }


def trackio_rows(project: str, name: str) -> Rows:
    from trackio.sqlite_storage import SQLiteStorage

    rows: Rows = {}
    for line in SQLiteStorage.get_logs(project, name):
        for key, value in line.items():
            if key not in ("timestamp", "step"):
                rows.setdefault(key, []).append((line["step"], value))
    return rows


SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*",?)*)\})? (\S+)')


def prometheus_values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Parse the text format strictly: each family once, its HELP and TYPE first, escapes undone."""
    assert text.endswith("\n")
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    state: dict[str, str] = {}
    for line in text.splitlines():
        assert line
        if line.startswith("# "):
            _, word, family, said = line.split(" ", 3)
            assert state.get(family) == {"HELP": None, "TYPE": "HELP"}[word]
            assert word == "HELP" or said == "gauge"
            state[family] = word
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        assert state[match[1]] == "TYPE"
        state[match[1]] = "sampled"
        labels = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or "")
        undo: Callable[[str], str] = lambda value: re.sub(  # noqa: E731
            r"\\(.)", lambda found: "\n" if found[1] == "n" else found[1], value
        )
        values[match[1], tuple((name, undo(value)) for name, value in labels)] = float(match[3])
    return values


def same(ours: Any, theirs: Any) -> bool:
    """Equality in which NaN equals itself, through lists and pairs."""
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs) or (math.isnan(ours) and math.isnan(theirs))
