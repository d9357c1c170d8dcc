"""Measuring beside the alternatives: what every example's squared gradient norm costs, and how exact it is.

    make rivals
    python -m benchmarks.rivals [--rounds 20] [--models cnn gpt] [--methods vmap] [--threads 2]

`make rivals` runs this in an environment of its own, `.venv-rivals`, with the packages of benchmarks/rivals.txt; in
any other environment their cells say "not installed: make rivals". benchmarks/rival_steps.py holds the steps. A cell is
the ratio to a plain step (forward, backward, Adagrad), and in brackets the largest relative error of |g_i|^2 over the
first 16 examples of the batch, in float32, against a loop in float64; "BackPACK variance" has the error of V over a
batch of these 16 alone. "not supported" means that the method was tried and failed, and the reason stands under the
table. Then it is also tried on the model rewritten for it, where there is such a model (`REWRITTEN`), and "*" marks
the result.

All in one process. First plain, control (the same plain step once more) and ours, interleaved. Then every alternative
in a rotation of its own with the same three: in a common one, whatever takes much memory slows what runs after it,
because freed blocks are faulted in again. For the same reason an untimed plain step follows each of its calls. Ratios
are of medians, to the plain steps of the same rotation; "PerExample" comes from the first rotation, in which no
alternative runs, and in the JSON from all. An alternative that takes over 8 plain steps is timed in half the rounds,
one step at a time. A rotation whose control leaves 0.97 to 1.03 is repeated, at most twice; "controls" is the range
over a model's rotations. The script starts itself again with malloc told to keep freed memory, as
benchmarks/engine.py does.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine import ALLOCATOR
from benchmarks.machine import machine, write_json
from benchmarks.models import MODELS, Workload
from benchmarks.rival_methods import OURS, REWRITTEN, RIVALS, Unsupported, attempt
from benchmarks.rival_steps import Step, plain
from benchmarks.statistics import CONTROL, TRIES

SLOW = 8  # plain steps
Times = dict[str, list[float]]


def seconds(step: Step, calls: int) -> float:
    """Return seconds per call."""
    started = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - started) / calls


def quickest(step: Step) -> float:
    """Return the seconds of the quicker of two calls."""
    return min(seconds(step, 1), seconds(step, 1))


def contiguous(work: Workload, n: int) -> tuple[Tensor, Tensor]:
    """Return n inputs and targets, contiguous, as some packages need them."""
    x, y = work.data(n)
    return x.contiguous(), y.contiguous()


def rotate(steps: dict[str, Step], calls: dict[str, int], rounds: int, settle: Step | None) -> Times:
    """Time all steps in turn, each round in another order.

    Args:
        steps: What to time, by name.
        calls: How many calls of each are timed together.
        rounds: How often.
        settle: Run untimed after the last of `steps`.

    Returns:
        Seconds per call, one number a round.
    """
    names = list(steps)
    times: Times = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(seconds(steps[name], calls[name]))
            if settle is not None and name == names[-1]:
                settle()
    return times


def steady(steps: dict[str, Step], work: Workload, rounds: int, tries: int) -> tuple[Times, float]:
    """Time a rotation until its control is near 1.

    Args:
        steps: "plain", "control", "ours" and perhaps one alternative, all warmed up.
        work: What they train.
        rounds: Rounds, or twice those where the alternative is slow.
        tries: How often at most.

    Returns:
        Seconds per call, and the control's ratio.
    """
    calls = dict.fromkeys(steps, work.steps)
    last = list(steps)[-1]
    settle = None if last in OURS else steps["plain"]
    if settle is not None and quickest(steps[last]) > SLOW * quickest(settle):
        calls[last], rounds = 1, max(1, rounds // 2)
    for _ in range(tries):
        times = rotate(steps, calls, rounds, settle)
        control = median(times["control"]) / median(times["plain"])
        if CONTROL[0] <= control <= CONTROL[1]:
            break
    return times, control


def ratio(times: Times, name: str) -> float:
    """Return the ratio of medians to the plain steps, both kinds taken together."""
    return median(times[name]) / ((median(times["plain"]) + median(times["control"])) / 2)


def compare(name: str, methods: list[str], rounds: int, tries: int) -> tuple[list[str], list[str], dict[str, Any]]:
    """Measure one model in every way.

    Args:
        name: Key of `MODELS`.
        methods: Keys of `RIVALS`.
        rounds: Rounds of each rotation.
        tries: Of each rotation, at most.

    Returns:
        The row's cells, notes, and what the JSON holds.
    """
    work = MODELS[name]
    x, y = contiguous(work, work.batch)
    steps = {kind: plain(work, x, y)[1] for kind in ("plain", "control")}
    for step in steps.values():
        step()
    errors = {}
    for ours, method in OURS.items():
        steps[ours], errors[ours] = attempt(method, work, x, y)
    times, control = steady(steps, work, rounds, tries)
    found: dict[str, Any] = {"first": times, "errors": errors, "notes": []}
    cells, controls = [f"{ratio(times, ours):.3f} ({errors[ours]:.0e})" for ours in OURS], [control]
    base = 1e3 * (median(times["plain"]) + median(times["control"])) / 2
    for rival in methods:
        cell = ""
        for mark, tried in (("", work), ("*", REWRITTEN.get(name))):
            if tried is None or cell[:1].isdigit():
                continue
            try:
                step, wrong = attempt(RIVALS[rival], tried, x, y)
            except Unsupported as reason:
                cell = reason.cell
                found["notes"].append(f"{rival} on {name}{mark}: {reason}")
                continue
            times, control = steady({**steps, rival: step}, work, rounds, tries)
            found[rival], found["errors"][rival] = times, wrong
            controls.append(control)
            cell = f"{ratio(times, rival):.3f}{mark} ({wrong:.0e})"
            del step
        cells.append(cell)
        gc.collect()
    return [f"{base:.3f}", f"{min(controls):.3f} to {max(controls):.3f}", *cells], found["notes"], found


def main(arguments: list[str] | None = None) -> None:
    """Measure all models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds of each rotation")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="*", choices=list(RIVALS), default=list(RIVALS))
    parser.add_argument("--tries", type=int, default=TRIES, help="of a rotation whose control is off, at most")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    if arguments is None and not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.rivals", *sys.argv[1:]], os.environ | ALLOCATOR)
    torch.set_num_threads(options.threads)
    for harmless in ("Full backward hook is firing", "There is a performance drop because we have not yet implemented"):
        warnings.filterwarnings("ignore", message=harmless)
    started = time.perf_counter()
    print(f"{options.rounds} interleaved rounds; {machine()}", flush=True)
    print(f"| model | plain, ms | controls | {' | '.join([*OURS, *options.methods])} |")
    print(f"|{'---|' * (3 + len(OURS) + len(options.methods))}", flush=True)
    rows, notes = {}, []
    for name in options.models:
        cells, reasons, rows[name] = compare(name, options.methods, options.rounds, options.tries)
        print(f"| {name} b={MODELS[name].batch} | {' | '.join(cells)} |", flush=True)
        notes += reasons
    print("\n*: on the model rewritten for it\n")
    print("\n".join(f"- {note}" for note in notes))
    print(f"\n{time.perf_counter() - started:.0f} s; written to", write_json("rivals", {"rows": rows}))


if __name__ == "__main__":
    main()
