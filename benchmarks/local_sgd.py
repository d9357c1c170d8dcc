"""Local steps beside synchronous training: what is sent, and what accuracy is left, on MNIST in four processes.

``python -m benchmarks.local_sgd --data DIR`` with DIR the folder that holds ``mnist/``; about 20 minutes on two cores.
Prints the tables of docs/results.md, and writes every run into results/local_sgd.json.

All rows train the same network on as many samples with SGD and momentum. "sent" is what one rank hands over for
all-reduces: gradients under DistributedDataParallel, models and momentum under local steps, and what tests send.
Every test reads its statistics at every step, or at every meeting.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import adadagrad as ada
from adadagrad.cli.models import mlp
from benchmarks.machine import machine, write_json
from benchmarks.splits import mnist
from tests.ranks import on_ranks

RANKS = 4
SEEDS = (0, 1, 2)
EPOCHS = 3
START, CAP = 64, 4096


@dataclass(frozen=True)
class Config:
    """One run.

    Args:
        local_steps: H; 0 for DistributedDataParallel.
        eta: Of the norm test; None for a constant batch.
        own_data: Whether each rank has images of its own digits only.
        estimator: What measures under local steps: ``"Worker"``, ``"PerExample"`` or ``"drifts"``.
        optimizer_state: What becomes of the momentum at a meeting.
        seed: Of model and order.
    """

    local_steps: int
    eta: float | None = None
    own_data: bool = False
    estimator: str = "Worker"
    optimizer_state: Any = "average"
    seed: int = 0


def run(rank: int, config: Config, folder: str, epochs: float) -> dict[str, float]:
    """Train one rank of a run; return what it has come to, the same on all ranks.

    Args:
        rank: This rank.
        config: The run.
        folder: Where ``mnist/`` lies.
        epochs: How often the whole data set is gone through.
    """
    splits = mnist(folder)
    torch.manual_seed(config.seed)
    module = mlp((1, 28, 28), 10)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
    policy = ada.ConstantBatch(START) if config.eta is None else ada.NormTest(eta=config.eta)
    estimator = ada.PerExample() if config.estimator == "PerExample" else ada.Worker()
    measured = config.eta is not None and config.estimator != "drifts"
    parallel = None
    model: Any = DistributedDataParallel(module) if config.local_steps == 0 else module
    if config.local_steps:
        parallel = ada.LocalSGD(
            module,
            optimizer,
            config.local_steps,
            optimizer_state=config.optimizer_state,
            noise="drifts" if config.estimator == "drifts" else "gradients",
            own_data=config.own_data,
        )
    engine = ada.AdaptiveBatch(
        model,
        optimizer,
        _digits_of(rank, splits.train) if config.own_data else splits.train,
        policy,
        global_batch_size=START,
        max_batch_size=CAP,
        micro_batch_size=1024,
        total_samples=round(epochs * len(splits.train)),
        measure=ada.Measure(estimator=estimator, every=1, max_examples=256) if measured else None,
        parallel=parallel,
        seed=config.seed,
    )
    sent = -engine.parallel.ranks.bytes_sent
    for step in engine:
        step.run(lambda batch: F.cross_entropy(model(batch[0]), batch[1]))
        step.update()
    sent += engine.parallel.ranks.bytes_sent
    gradients = sum(p.numel() * p.element_size() for p in module.parameters())
    module.eval()
    inputs, labels = splits.test.tensors
    with torch.no_grad():
        accuracy = float((module(inputs).argmax(1) == labels).float().mean())
    return {
        "accuracy": accuracy,
        "steps": engine.steps,
        "final_batch_size": engine.global_batch_size,
        "rounds": engine.steps if parallel is None else parallel.rounds,
        "bytes": sent + (gradients * engine.steps if parallel is None else 0),
    }


def _digits_of(rank: int, data: TensorDataset) -> TensorDataset:
    """Return the images of a rank's own digits: every fourth part of the images in the order of their labels."""
    rows = data.tensors[1].argsort(stable=True).tensor_split(RANKS)[rank]
    return TensorDataset(*(tensor[rows] for tensor in data.tensors))


HOMOGENEOUS = {
    "DDP, 64": Config(0),
    "H = 1, 64": Config(1),
    "H = 4, 64": Config(4),
    "H = 16, 64": Config(16),
    "H = 16, 64, momentum reset": Config(16, optimizer_state="reset"),
    "H = 16, 64, momentum kept by each rank": Config(16, optimizer_state="local"),
    "DDP, norm test 0.5": Config(0, 0.5),
    "H = 1, norm test 0.5": Config(1, 0.5),
    "H = 4, norm test 0.5": Config(4, 0.5),
    "H = 16, norm test 0.5": Config(16, 0.5),
    "H = 16, norm test 0.5, inside ranks": Config(16, 0.5, estimator="PerExample"),
    "H = 16, norm test 0.5, drifts": Config(16, 0.5, estimator="drifts"),
}
"""All ranks draw from the same images."""

HETEROGENEOUS = {
    "H = 4, 64": Config(4, own_data=True),
    "H = 4, norm test 0.5": Config(4, 0.5, own_data=True),
    "H = 4, norm test 0.5, inside ranks": Config(4, 0.5, own_data=True, estimator="PerExample"),
}
"""Each rank has two or three digits."""


def main() -> None:
    """Run all rows with all seeds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder that holds mnist/")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    arguments = parser.parse_args()
    print(f"{machine()}; {RANKS} processes; {arguments.epochs:g} epochs; {arguments.seeds} seeds", flush=True)
    kept: dict[str, Any] = {"machine": machine(), "epochs": arguments.epochs, "runs": []}
    for title, rows in (("the same data", HOMOGENEOUS), ("two or three digits a rank", HETEROGENEOUS)):
        print(f"\n{title}\n\n| | accuracy | steps | last batch | rounds | sent, MB |\n|---|---|---|---|---|---|")
        for name, config in rows.items():
            found = []
            for seed in range(arguments.seeds):
                one = Config(**{**asdict(config), "seed": seed})
                results = on_ranks(RANKS, run, one, arguments.data, arguments.epochs)
                assert all(result == results[0] for result in results), "the ranks do not end with the same model"
                found.append(results[0])
                kept["runs"].append({"name": name, "data": title, **asdict(one), **results[0]})
            print(row(name, found), flush=True)
    print(f"\nwritten to {write_json('local_sgd', kept)}")


def row(name: str, found: list[dict[str, float]]) -> str:
    """Return a line of the table: means over seeds, of the accuracy also the lowest and the highest.

    Args:
        name: What was trained.
        found: One result a seed.
    """

    def average(key: str) -> float:
        return mean(result[key] for result in found)

    accuracies = [result["accuracy"] for result in found]
    spread = f"{mean(accuracies):.4f} ({min(accuracies):.4f} to {max(accuracies):.4f})"
    counts = [f"{average(key):,.0f}" for key in ("steps", "final_batch_size", "rounds")]
    return " | ".join([f"| {name}", spread, *counts, f"{average('bytes') / 1e6:,.1f} |"])


if __name__ == "__main__":
    main()
