"""``adadagrad federated``: rounds of many clients through a radio channel, simulated in one process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from adadagrad.cli.arguments import read_flags
from adadagrad.cli.data import DataSource, load_data
from adadagrad.cli.directory import new_directory, remove_if_empty
from adadagrad.cli.evaluation import Evaluator
from adadagrad.cli.federated_arguments import DRIFT_ONLY, SERVERS, WITH_POWER, FederatedCommand
from adadagrad.cli.federated_sheet import federated_sheet
from adadagrad.cli.fit import check_data, check_fit
from adadagrad.cli.interrupt import Interrupt
from adadagrad.cli.names import find, make_model
from adadagrad.cli.outcome import check_seed, in_flags_of, refuse_unread, write_outcome
from adadagrad.cli.own_code import own_code
from adadagrad.cli.progress import progress_display
from adadagrad.core.checks import check_at_least, check_fraction, check_integer
from adadagrad.core.errors import NonFiniteGradient
from adadagrad.core.mixing import seed_for
from adadagrad.federated import Channel, LocalWork, Server, dirichlet_split, simulate
from adadagrad.federated.simulation import asked_clients

DROPPING = 3
"""Word that keeps the rehearsal of drop-outs apart from other draws of a seed."""
LOG_NAME = "left-out.log"
"""Which client was left out of which round, and why."""
RENAMED = {
    "alpha": "tail-index",
    "scale": "noise-scale",
    "num_clients": "clients",
    "fraction": "share",
    "epochs": "local-epochs",
    "batch_size": "local-batch-size",
}


def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Args:
        arguments: What follows ``federated``.

    Returns:
        The exit status: 0, or 130 after Ctrl-C or SIGTERM.

    Raises:
        NonFiniteGradient: The weights have become infinite or NaN; what was done is written all the same.
    """
    command = read_flags("federated", FederatedCommand(), arguments)
    data = load_data(command.problem.data)
    check_data(data)
    with in_flags_of(command, **RENAMED):
        _refuse_unused(command, arguments)
        server, clients, work = make_federation(command, data)
    directory = new_directory(command.run.out, "federated")
    try:
        with _log_in(directory / LOG_NAME), own_code(f"--model {command.problem.model}, in training,"):
            finished, rows = train(command, server, clients, work, data)
        torch.save(server.state_dict(), directory / "server.pt")
        write_outcome(directory, command, rows, federated_sheet(command, rows))
    finally:
        remove_if_empty(directory)
    if rows:
        best = [row["accuracy"] for row in rows if row["accuracy"] is not None]
        print(f"{len(rows)} rounds, last accuracy {best[-1]:.3f}, best {max(best):.3f}: {directory}")
    lost = sum(len(row["left_out"]) for row in rows)
    if lost:
        print(f"{lost} answers were left out: {directory / LOG_NAME}", file=sys.stderr)
    if not all(bool(param.isfinite().all()) for param in server.model.parameters()):
        raise NonFiniteGradient("the weights are not finite any more: lower --lr, or --noise-scale")
    return 0 if finished else 130


def make_federation(command: FederatedCommand, data: DataSource) -> tuple[Server, list[Subset[Any]], LocalWork]:
    """Build what takes part: nothing is trained yet, and every argument is checked.

    Args:
        command: What the user chose.
        data: What ``--data`` names.

    Returns:
        The server, the clients' data and their work.
    """
    problem, run = command.problem, command.run
    check_integer(1, rounds=run.rounds, evaluations=run.evaluations)
    check_seed(run.seed)
    check_at_least(0, lr=command.server.lr)
    check_fraction(drop_out=command.client.drop_out)
    asked_clients(problem.clients, command.client.share, run.seed, 1)  # refuses a share out of its range
    channel = Channel(
        alpha=command.channel.tail_index,
        scale=command.channel.noise_scale,
        fading=command.channel.fading,
        noise_on=command.channel.noise_on,
        seed=run.seed,
    )
    with in_flags_of(command, **{**RENAMED, "lr": "local-lr"}):
        work = LocalWork(
            message=command.client.message,
            epochs=command.client.local_epochs,
            lr=command.client.local_lr,
            batch_size=command.client.local_batch_size,
        )
    torch.manual_seed(run.seed)
    model = make_model(problem.model, data)
    check_fit(model, problem.model, data)
    with in_flags_of(command, alpha="power"):
        optimizer = find("server", command.server.server, SERVERS)(model.parameters(), command.server)
    server = Server(model, optimizer, channel, follow_tail=command.server.follow_tail)
    labels = torch.tensor([int(data.train[index][1]) for index in range(len(data.train))])  # type: ignore[arg-type]
    parts = dirichlet_split(labels, problem.clients, problem.concentration, seed=run.seed)
    return server, [Subset(data.train, part.tolist()) for part in parts], work


def train(
    command: FederatedCommand, server: Server, clients: Sequence[Subset[Any]], work: LocalWork, data: DataSource
) -> tuple[bool, list[dict[str, Any]]]:
    """Run the rounds, with a line of progress.

    Args:
        command: What the user chose.
        server: Model, optimizer and channel.
        clients: Their data.
        work: Of the clients.
        data: To evaluate on.

    Returns:
        Whether all rounds were run, and a row for each.
    """
    run = command.run
    rows: list[dict[str, Any]] = []
    evaluator = Evaluator(data.held_out, data.split, run.rounds, run.evaluations)
    progress = progress_display("federated", run.rounds)
    with closing(progress), Interrupt() as interrupt:
        for number in range(1, run.rounds + 1):
            record = simulate(
                server,
                clients,
                _loss,
                rounds=1,
                work=work,
                fraction=command.client.share,
                seed=run.seed,
                first_round=number,
                drops_out=lambda at, client: _drops(command, at, client),
            )[0]
            broken = not all(bool(param.isfinite().all()) for param in server.model.parameters())
            due = evaluator.is_due(number - 1, number) or interrupt.requested or broken
            accuracy = evaluator(server.model)[f"{data.split}/accuracy"] if due else None
            rows.append(_row(asdict(record), accuracy))
            norm = "-" if record.grad_norm is None else f"{record.grad_norm:.3g}"
            shown = next((row["accuracy"] for row in reversed(rows) if row["accuracy"] is not None), None)
            parts = [f"round {number}", f"answered {len(record.answered)}", f"heard {norm}"]
            progress.show(number, [*parts, "acc -" if shown is None else f"acc {shown:.3f}"])
            if interrupt.requested or broken:
                break
    return not interrupt.requested, rows


def _row(record: dict[str, Any], accuracy: float | None) -> dict[str, Any]:
    tail = record["tail"]
    return {
        "round": record["round_number"],
        "asked": len(record["asked"]),
        "answered": len(record["answered"]),
        "left_out": {str(client): reason for client, reason in record["left_out"].items()},
        "grad_norm": record["grad_norm"],
        "tail_index": None if tail is None else tail["alpha"],
        "accuracy": accuracy,
    }


def _loss(model: nn.Module, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    return F.cross_entropy(model(batch[0].to(device)), batch[1].to(device))


def _drops(command: FederatedCommand, round_number: int, client: int) -> bool:
    drawn = (seed_for(command.run.seed, DROPPING, round_number, client) >> 11) * 2.0**-53
    return drawn < command.client.drop_out


@contextmanager
def _log_in(path: Path) -> Iterator[None]:
    """Send what the rounds have to say into a file, which is made with the first line."""
    handler = logging.FileHandler(path, delay=True, encoding="utf-8")
    logger = logging.getLogger("adadagrad.federated")
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)
        handler.close()


def _refuse_unused(command: FederatedCommand, arguments: Sequence[str]) -> None:
    """Refuse flags that change nothing beside the others."""
    power = (command.server.server in WITH_POWER, f"--server {' or '.join(WITH_POWER)}")
    drift = (command.client.message == "drift", "--message drift")
    noise = (command.channel.noise_scale > 0, "a --noise-scale above 0")
    readers = {"power": power, "follow_tail": power, "tail_index": noise, "noise_on": noise}
    refuse_unread(arguments, readers | dict.fromkeys(DRIFT_ONLY, drift))
    if command.server.follow_tail and command.channel.noise_scale == 0:
        print("adadagrad: --follow-tail beside --noise-scale 0 follows the signal, which has no tail", file=sys.stderr)
