"""Extrapolation at large batch: a perceptron on digits and one on MNIST, sixteen simulated workers.

    python -m benchmarks.companions.large_batch --data DIR [--tasks digits digits-short mnist] [--jobs 1]

Nesterov momentum 0.9, 10 % warm-up, a tenth of the rate from 60 % on. Twelve settings for every arm: twelve learning
rates for the baseline, four with three displacements for the others; one more rate for all where the best lies at an
end. Chosen on the validation part by the mean of three seeds; reported on the test part with ten others. "small batch"
is 32 examples a step and as many examples in all, four rates.

| task | network | examples a step | steps |
|---|---|---|---|
| digits | 64-64-64-10 | 1,024 of 1,078 | 63 |
| digits-short | the same | the same | 38 |
| mnist | 784-64-64-10 | 4,096 | 150 |
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adadagrad.optimizers import ExtrapolatedSGD
from benchmarks.companions.kept import results, spread, table
from benchmarks.machine import machine, write_json
from benchmarks.splits import Splits, digits, mnist

WORKERS = 16
TASKS: dict[str, dict[str, Any]] = {
    "digits": {"load": digits, "inputs": 64, "batch": 1024, "steps": 63},
    "digits-short": {"load": digits, "inputs": 64, "batch": 1024, "steps": 38},
    "mnist": {"load": mnist, "inputs": 784, "batch": 4096, "steps": 150},
}
BASE = [0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8, 1.1]
FEW = [0.05, 0.1, 0.2, 0.4]
ARMS: dict[str, tuple[str, list[float], list[float]]] = {
    "nesterov": ("Nesterov", BASE, [0.0]),
    "past_local": ("past local gradient", FEW, [0.5, 1.5, 4.5]),
    "past_global": ("past global gradient", FEW, [0.5, 1.5, 4.5]),
    "isotropic": ("isotropic noise", FEW, [0.03, 0.1, 0.3]),
    "filter": ("noise scaled by filters", FEW, [0.3, 1.0, 3.0]),
    "small": ("small batch of 32", [0.01, 0.02, 0.04, 0.08], [0.0]),
}
"""By key: what the table says, learning rates, displacements relative to the rate."""


def run(*, task: str, arm: str, lr: float, ratio: float, seed: int, part: str, data: str) -> dict[str, Any]:
    """Train one model.

    Args:
        task: Key of `TASKS`.
        arm: Key of `ARMS`.
        lr: Learning rate.
        ratio: Displacement relative to it.
        seed: Of weights, order and noise.
        part: ``"val"`` or ``"test"``.
        data: Where ``mnist/`` lies.
    """
    shape, splits = TASKS[task], _splits(task, data)
    batch, steps, workers = shape["batch"], shape["steps"], WORKERS
    if arm == "small":
        steps, batch, workers = steps * batch // 32, 32, 1
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(shape["inputs"], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    perturb: Any = arm if arm in ("past_local", "past_global", "isotropic", "filter") else "past_global"
    optimizer = ExtrapolatedSGD(
        model.parameters(), lr=lr, extrapolation=ratio, perturb=perturb, workers=workers, seed=seed
    )
    x, y = splits.train.tensors
    generator, loss = torch.Generator().manual_seed(seed), torch.zeros(())
    order = torch.empty(0, dtype=torch.long)
    for t in range(steps):
        factor = min(1.0, (t + 1) / max(1, steps // 10)) * (0.1 if t >= 0.6 * steps else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        if len(order) < batch:
            order = torch.randperm(len(x), generator=generator)
        rows, order = order[:batch], order[batch:]
        for worker, some in enumerate(rows.chunk(workers)):
            with optimizer.extrapolated(worker):
                loss = F.cross_entropy(model(x[some]), y[some])
                (loss / workers).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not bool(loss.detach().isfinite()):
            return {"metric": None, "train": None}
    with torch.no_grad():
        inputs, labels = getattr(splits, part).tensors
        accuracy = float((model(inputs).argmax(1) == labels).float().mean())
        train = float(F.cross_entropy(model(x[:5000]), y[:5000]))
    return {"metric": accuracy, "train": train}


def _splits(task: str, data: str) -> Splits:
    found: Splits = TASKS[task]["load"](data)
    return found


def choose(task: str, arm: str, data: str, jobs: int, seeds: list[int]) -> tuple[float, float, bool]:
    """Return the best learning rate and displacement of an arm, and whether they lie at an edge.

    Args:
        task: Key of `TASKS`.
        arm: Key of `ARMS`.
        data: Where ``mnist/`` lies.
        jobs: Processes.
        seeds: Of the validation runs, whose mean counts.
    """
    _, rates, ratios = ARMS[arm]
    grid, scores = [(lr, ratio) for lr in rates for ratio in ratios], {}
    for _ in range(2):
        wanted = [point for point in grid if point not in scores]
        runs = [
            {"task": task, "arm": arm, "lr": lr, "ratio": ratio, "seed": seed, "part": "val", "data": data}
            for lr, ratio in wanted
            for seed in seeds
        ]
        found = results("large_batch", run, runs, jobs)
        for index, point in enumerate(wanted):
            metrics = [r["metric"] for r in found[index * len(seeds) : (index + 1) * len(seeds)]]
            scores[point] = mean(0.0 if m is None else m for m in metrics)
        best = max(scores, key=lambda point: scores[point])
        rates_now = sorted({lr for lr, _ in grid})
        if best[0] == rates_now[0]:
            grid += [(float(f"{best[0] / 2:.3g}"), ratio) for ratio in ratios]
        elif best[0] == rates_now[-1]:
            grid += [(float(f"{best[0] * 2:.3g}"), ratio) for ratio in ratios]
    best = max(scores, key=lambda point: scores[point])
    tried = [lr for lr, _ in scores]
    at_edge = best[0] in (min(tried), max(tried)) or (len(ratios) > 1 and best[1] in (ratios[0], ratios[-1]))
    return best[0], best[1], at_edge


def study(tasks: list[str], data: str, jobs: int, seeds: int, tuning: int) -> list[list[str]]:
    """Tune and run all arms.

    Args:
        tasks: Keys of `TASKS`.
        data: Where ``mnist/`` lies.
        jobs: Processes.
        seeds: How many are reported.
        tuning: How many others choose.

    Returns:
        The rows of the table.
    """
    rows, content = [], []
    for task in tasks:
        for arm, (label, _, ratios) in ARMS.items():
            lr, ratio, edge = choose(task, arm, data, jobs, [100 + seed for seed in range(tuning)])
            settings = {"task": task, "arm": arm, "lr": lr, "ratio": ratio, "part": "test", "data": data}
            found = results("large_batch", run, [{**settings, "seed": seed} for seed in range(seeds)], jobs)
            content += found
            metrics = [None if r["metric"] is None else 100 * r["metric"] for r in found]
            displacement = f"{ratio:g}" if len(ratios) > 1 else ""
            losses = spread([r["train"] for r in found])
            rows.append([task, label, spread(metrics, 1), losses, f"{lr:g}", displacement, "yes" if edge else "no"])
            print(rows[-1], flush=True)
    write_json("companions/large_batch", {"runs": content})
    return rows


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds mnist/")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tuning", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = study(chosen.tasks, chosen.data, chosen.jobs, chosen.seeds, chosen.tuning)
    heads = ["task", "method", "test accuracy, %", "training loss", "lr", "displacement / lr", "at an edge"]
    print(table(heads, rows))
    print(machine())


if __name__ == "__main__":
    main()
