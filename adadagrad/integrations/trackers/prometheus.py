"""A Prometheus text file, as node exporter's textfile collector reads it: the newest number of each name."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from adadagrad.core.checks import check_at_least
from adadagrad.core.errors import InvalidArgument
from adadagrad.integrations.trackers.metrics import PREFIX

NAMESPACE = "adadagrad_"


class Prometheus:
    """Writes one file, replaced whole, that always holds the state of the run. Needs no package.

    A name becomes ``adadagrad_`` and itself, every character that Prometheus does not take as ``_``:
    ``val/accuracy`` is ``adadagrad_val_accuracy``. The x axis of Prometheus is time; ``adadagrad_samples_seen`` and
    ``adadagrad_step`` stand beside the others, and ``rate(adadagrad_samples_seen[1m])`` is the throughput.

    Args:
        path: The file, whose name ends in ``.prom``; its folder is made where it is missing.
        labels: Set on every number, to tell runs apart, for example ``{"run": "train-001"}``; each run needs a file of
            its own.
        every_seconds: Shortest time between two writes; 0 writes at each call.

    Raises:
        InvalidArgument: The path, a label's name or `every_seconds` is not what it should be.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Prometheus(Path(folder, "run.prom"), labels={"run": "one"})
        ...     file.log({"adadagrad/loss": 0.5}, samples_seen=64, step=1)
        ...     print(Path(folder, "run.prom").read_text().splitlines()[2])
        adadagrad_loss{run="one"} 0.5
    """

    def __init__(
        self, path: str | os.PathLike[str], *, labels: Mapping[str, str] | None = None, every_seconds: float = 1.0
    ) -> None:
        self.path = Path(path)
        check_at_least(0, every_seconds=every_seconds)
        if self.path.suffix != ".prom":
            raise InvalidArgument(f"path must end in .prom, which node exporter looks for, got {str(path)!r}")
        for name in labels or {}:
            if not re.fullmatch(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*", name):
                raise InvalidArgument(f"labels must have names of letters, digits and _, got {name!r}")
        pairs = [f'{name}="{_escaped(str(value))}"' for name, value in (labels or {}).items()]
        self._labels = "{" + ",".join(pairs) + "}" if pairs else ""
        self._every_seconds, self._written = every_seconds, -math.inf
        self._names: dict[str, str] = {}  # Prometheus's by ours
        self._values: dict[str, float] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, metrics: Mapping[str, float], *, samples_seen: int, step: int) -> None:
        """Take numbers in, and write the file where that is due.

        Args:
            metrics: By name.
            samples_seen: A number beside them.
            step: The same.
        """
        self._values |= {**metrics, PREFIX + "samples_seen": samples_seen, PREFIX + "step": step}
        if time.monotonic() - self._written >= self._every_seconds:
            self._write()

    def close(self) -> None:
        """Write the last numbers; the file stays."""
        if self._values:
            self._write()

    def _write(self) -> None:
        lines = []
        for ours, value in self._values.items():
            name = self._name(ours)
            said = _escaped(ours, quotes=False)
            lines += [f"# HELP {name} {said} of a training run", f"# TYPE {name} gauge"]
            lines.append(f"{name}{self._labels} {_number(float(value))}")
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")  # which node exporter passes over
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        beside.replace(self.path)
        self._written = time.monotonic()

    def _name(self, ours: str) -> str:
        """Return the name in Prometheus; a number behind it tells two apart that would be the same."""
        if ours not in self._names:
            plain = NAMESPACE + re.sub(r"[^a-zA-Z0-9_]", "_", ours.removeprefix(PREFIX))
            taken, name, count = set(self._names.values()), plain, 2
            while name in taken:
                name, count = f"{plain}_{count}", count + 1
            self._names[ours] = name
        return self._names[ours]


def _escaped(text: str, quotes: bool = True) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
