"""Federated rounds under Flower, in its simulation or with a process for each client, beside the same in this process.

    python -m benchmarks.neighbours.flower_loopback [--processes] [--clients 50] [--rounds 20] [--data digits]

Softmax regression, a Dirichlet(0.1) split, full local gradients, Rayleigh fading and heavy-tailed noise, Adam-OTA on
the server. Prints the rounds, the accuracy on held-out examples, and whether Flower's weights are bit for bit those of
`adadagrad.federated.simulate`. Needs the extras ``flower`` and ``cli``; only loopback is used.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine, write_json
from benchmarks.neighbours.flower_deployment import Deployment, quiet_environment
from benchmarks.neighbours.flower_federation import Federation, loss

SOURCE = """\
from benchmarks.neighbours.flower_federation import Federation
from benchmarks.neighbours.flower_loopback import apps

both = apps(Federation(**{federation!r}), {rounds}, {out!r})
server = both[0]  # flwr reads the source and sees plain assignments only
client = both[1]
"""


def apps(federation: Federation, rounds: int, out: str, **options: Any) -> tuple[Any, Any]:
    """Return a ServerApp and a ClientApp; the server writes weights and records into a file as its last act.

    Args:
        federation: What is trained.
        rounds: How many.
        out: The file.
        **options: More for `OverTheAir`.
    """
    from flwr.serverapp import ServerApp

    from adadagrad.integrations.flower import OverTheAir, client_app

    def main(grid: Any, context: Any) -> None:
        waits = {"connect_timeout": 300.0, **options}  # many processes start on few cores
        strategy = OverTheAir(federation.server(), num_clients=federation.clients, **waits)
        strategy.run(grid, rounds)
        write(out, dict(strategy.server.model.state_dict()), strategy.records)

    server = ServerApp()
    server.main()(main)
    return server, client_app(federation.model, federation.dataset, loss, federation.work, seed=federation.seed)


def write(out: str, weights: dict[str, Tensor], records: list[Any]) -> None:
    """Write what a run has come to, such that the file is there at once and whole.

    Args:
        out: The file.
        weights: By name.
        records: Of the rounds.
    """
    partial = Path(out + ".partial")
    torch.save({"weights": weights, "records": [asdict(record) for record in records]}, partial)
    partial.rename(out)


def in_simulation(federation: Federation, rounds: int, out: Path, actors: int = 1) -> None:
    """Run in Flower's simulation, with Ray.

    Args:
        federation: What is trained.
        rounds: How many.
        out: File for weights and records.
        actors: Processes that the clients share.
    """
    from flwr.simulation import run_simulation

    server, client = apps(federation, rounds, str(out))
    memory = 100 * 2**20  # bytes for objects that processes share: a message is far smaller
    settings: dict[str, Any] = {
        "init_args": {
            "num_cpus": actors,
            "object_store_memory": memory,
            "include_dashboard": False,
        },
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
    }
    run_simulation(server, client, num_supernodes=federation.clients, backend_config=settings)


def in_processes(federation: Federation, rounds: int, out: Path) -> None:
    """Run in Flower's deployment runtime, with a SuperNode and a ClientApp process for each client.

    Args:
        federation: What is trained.
        rounds: How many.
        out: File for weights and records.
    """
    with Deployment(federation.clients, out.parent) as deployment:
        source = SOURCE.format(federation=asdict(federation), rounds=rounds, out=str(out))
        deployment.run(source, wait_for=out, timeout=120 + 60 * rounds)


def main() -> None:
    """Run both, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", action="store_true", help="a process for each client (10 unless --clients)")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--data", default="digits", help="digits, mnist:DIR or blobs")
    parser.add_argument("--concentration", type=float, default=0.1)
    parser.add_argument("--message", choices=("gradient", "drift"), default="gradient")
    parser.add_argument("--scale", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    federation = Federation(
        data=given.data,
        clients=given.clients or (10 if given.processes else 50),
        concentration=given.concentration,
        seed=given.seed,
        scale=given.scale,
        lr=given.lr,
        message=given.message,
    )
    with tempfile.TemporaryDirectory(prefix="flower-") as folder:
        out = Path(folder) / "out.pt"
        os.environ.update(quiet_environment(Path(folder) / "home"))  # before Flower is imported
        start = time.perf_counter()
        (in_processes if given.processes else in_simulation)(federation, given.rounds, out)
        seconds = time.perf_counter() - start
        found = torch.load(out)
    start = time.perf_counter()
    weights, _ = federation.in_process(given.rounds)
    own_seconds = time.perf_counter() - start
    report(federation, found, weights, seconds, own_seconds, "processes" if given.processes else "simulation")


def report(
    federation: Federation,
    found: dict[str, Any],
    weights: dict[str, Tensor],
    seconds: float,
    own_seconds: float,
    runtime: str,
) -> None:
    """Print and write.

    Args:
        federation: What was trained.
        found: Weights and records under Flower.
        weights: In this process.
        seconds: Under Flower.
        own_seconds: In this process.
        runtime: Of Flower.
    """
    import flwr

    print(machine())
    print(f"flwr {flwr.__version__}, {runtime}: {federation}")
    records = found["records"]
    for record in records[:: max(1, len(records) // 10)]:
        left = f", left out {record['left_out']}" if record["left_out"] else ""
        print(
            f"round {record['round_number']}: {len(record['answered'])} of {len(record['asked'])} answered, "
            f"|g| = {record['grad_norm']:.3g}{left}"
        )
    equal = all(torch.equal(found["weights"][name], weights[name]) for name in weights)
    accuracies = {"before": federation.accuracy(dict(federation.model().state_dict()))}
    accuracies["after"] = federation.accuracy(found["weights"])
    print(f"accuracy {accuracies['before']:.4f} -> {accuracies['after']:.4f} after {len(records)} rounds")
    print(f"weights equal to the in-process ones, bit for bit: {equal}")
    print(f"Flower {seconds:.1f} s, in this process {own_seconds:.2f} s")
    path = write_json(
        f"flower-{runtime}",
        {
            "federation": asdict(federation),
            "flwr": flwr.__version__,
            "accuracy": accuracies,
            "equal": equal,
            "seconds": seconds,
            "seconds_in_process": own_seconds,
            "records": records,
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
