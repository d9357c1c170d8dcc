"""What measuring takes in memory: the peak of a measured step beside the plain step's, each case in a fresh process.

    python -m benchmarks.memory [--models cnn gpt] [--multiples 1 4] [--threads 2]

A step is forward, backward, update (Adagrad) and zero_grad, as in benchmarks/statistics.py. Its peak is the most bytes
of tensors alive at one time during the step, above what is there between steps: the running sum of the allocations and
frees that PyTorch's CPU allocator reports to the profiler (`profile_memory`). It depends neither on the load of the
machine nor on the habits of malloc or the size of pages, and so repeats to the byte, which resident memory does not. It
leaves out what does not come from that allocator, mostly scratch space inside oneDNN and MKL. So the growth of resident
memory stands beside it: VmHWM after ten steps (verifying ones included) minus VmRSS before the first, once everything
is imported and model, optimizer and data are there (Linux only). It also grows by what steps leave to Python's garbage
collector, which comes by only now and then.

"fixed" is model, optimizer state and data, in MB (10^6 bytes) like all else. "plain" is the plain step's peak. "all
examples" and "default settings" (the first 128 examples, as a micro-batch of their own; all where there are no more)
are ratios to it, for a step that does not verify; in brackets the ratio with the fixed part added to both. "extra" is
what default settings add to the plain step's peak. Two micro-batches need one more gradient of a parameter, to
add it to the first, and less of all else: so it is negative where activations are large. "verifying" is the ratio of
the first steps, which make trial runs, with all examples. Goals: all examples <= 1.15; extra independent of the batch
size.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import adadagrad as ada
from adadagrad.statistics.base import Request
from benchmarks.machine import machine, write_json
from benchmarks.models import MODELS, Workload
from benchmarks.steps import measured, plain

DEFAULT_EXAMPLES = ada.Measure().max_examples or sys.maxsize
WARM_UP = 10
VERIFYING = 3
GOAL = 1.15


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes of tensors alive at one time during a step, above those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def resident(name: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes, 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * int(found.group(1)) if found else 0


def forget_resident_peak() -> None:
    """Let VmHWM start again from the present."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def make(work: Workload, kind: str, n: int) -> Callable[[], object]:
    """Return a plain step ("plain"), or one that measures all examples ("all") or the default number ("default")."""
    x, y = work.data(n)
    if kind == "plain":
        return plain(work, x, y)
    return measured(work, x, y, Request(), n if kind == "all" else min(n, DEFAULT_EXAMPLES))


def fixed_bytes(work: Workload, n: int) -> int:
    """Return the bytes of model, optimizer state and data."""
    model, optimizer = work.fresh()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *states, *work.data(n)])


def case(name: str, kind: str, n: int) -> dict[str, int]:
    """Measure one case in this process.

    Args:
        name: Key of `MODELS`.
        kind: What the step does, see `make`.
        n: Examples in the batch.

    Returns:
        Bytes: peak of an ordinary step, of a verifying one, growth of resident memory, and the fixed part.
    """
    work = MODELS[name]
    step = make(work, kind, n)
    forget_resident_peak()
    before = resident("VmRSS")
    for _ in range(WARM_UP):
        step()
    growth = resident("VmHWM") - before
    peak = peak_bytes(step)
    verifying = peak
    if kind != "plain":
        step = make(work, kind, n)
        verifying = max(peak_bytes(step) for _ in range(VERIFYING))
    return {"peak": peak, "verifying": verifying, "resident": growth, "fixed": fixed_bytes(work, n)}


def in_fresh_process(name: str, kind: str, n: int, threads: int) -> dict[str, int]:
    """Return what `case` finds in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--case", name, kind, str(n), "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, n: int, found: dict[str, dict[str, int]]) -> str:
    """Return a line of the table.

    Args:
        name: Of the model.
        n: Examples in the batch.
        found: Results by kind.

    Returns:
        Markdown.
    """
    base, fixed = found["plain"]["peak"], found["plain"]["fixed"]
    cells = [f"{fixed / 1e6:.2f}", f"{base / 1e6:.2f}"]
    for kind in ("all", "default"):
        peak = found[kind]["peak"]
        cells.append(f"{peak / base:.3f} ({(peak + fixed) / (base + fixed):.3f})")
    cells.append(f"{(found['default']['peak'] - base) / 1e6:+.2f}")
    cells.append(f"{found['all']['verifying'] / base:.3f}")
    cells += [f"{found[kind]['resident'] / 1e6:.1f}" for kind in ("plain", "all", "default")]
    return f"| {name} b={n} | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--multiples", nargs="+", type=int, default=[1, 4], help="of the table's batch size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", nargs=3, metavar=("MODEL", "KIND", "N"), help="measure this alone, in this process")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(case(options.case[0], options.case[1], int(options.case[2]))))
        return
    print(machine(), flush=True)
    headings = ["model", "fixed, MB", "plain, MB", "all examples", "default settings", "extra, MB", "verifying"]
    headings += ["resident: plain, MB", "all examples, MB", "default, MB"]
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}", flush=True)
    rows: dict[str, Any] = {}
    for name in options.models:
        for multiple in options.multiples:
            n = multiple * MODELS[name].batch
            kinds = ("plain", "all", "default")
            rows[f"{name} b={n}"] = found = {k: in_fresh_process(name, k, n, options.threads) for k in kinds}
            print(row(name, n, found), flush=True)
    print(f"goal: all examples <= {GOAL}; written to", write_json("memory", {"rows": rows}))


if __name__ == "__main__":
    main()
