"""Federated rounds in one process: the clients send one after the other, and the server steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument, InvalidData
from adadagrad.core.mixing import seed_for
from adadagrad.federated.channel import Message
from adadagrad.federated.clients import LocalWork, Loss, client_message
from adadagrad.federated.server import RoundRecord, Server

SAMPLING = 2
"""Word that keeps the choice of clients apart from other draws of a seed."""


def simulate(
    server: Server,
    clients: Sequence[Dataset[Any]],
    loss: Loss,
    *,
    rounds: int,
    work: LocalWork | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    first_round: int = 1,
    drops_out: Callable[[int, int], bool] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> list[RoundRecord]:
    """Run federated rounds in this process.

    Everything is a function of the seeds and the numbers of round and client, so that rounds can be cut anywhere: ten
    rounds are three and then seven with ``first_round=4``. The same clients in processes of their own, under Flower
    (`adadagrad.integrations.flower`), give the same weights.

    Args:
        server: Model, optimizer and channel.
        clients: A data set each, none empty.
        loss: A function of the model and a batch: the mean loss over the batch.
        rounds: How many, >= 0.
        work: What clients do; None sends the gradient over all their examples.
        fraction: Share of the clients that is asked in a round, above 0 and at most 1; at least one is.
        seed: Of the clients' orders and of who is asked.
        first_round: Number of the first round.
        drops_out: Says of round and client whether the client does not answer; for rehearsals.
        on_round: Called with each round's record.

    Returns:
        A record for each round.

    Raises:
        InvalidArgument: An argument is out of its range.
        InvalidData: A client has no example.

    Example:
        >>> model = torch.nn.Linear(1, 1)
        >>> data = torch.utils.data.TensorDataset(torch.ones(4, 1), torch.zeros(4, 1))
        >>> square = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
        >>> server = Server(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> records = simulate(server, [data, data], square, rounds=50)
        >>> len(records), bool(model(torch.ones(1)).abs() < 1e-3)
        (50, True)
    """
    check_integer(0, rounds=rounds, seed=seed, first_round=first_round)
    if not clients:
        raise InvalidArgument("clients must hold at least one data set")
    for number, data in enumerate(clients):
        if len(data) == 0:  # type: ignore[arg-type]
            raise InvalidData(f"client {number} has no example: give it one, or leave it out")
    asked_by_round = [
        asked_clients(len(clients), fraction, seed, number) for number in range(first_round, first_round + rounds)
    ]
    records = []
    for round_number, asked in enumerate(asked_by_round, start=first_round):
        messages: dict[int, Message] = {}
        for client in asked:
            if drops_out is not None and drops_out(round_number, client):
                continue
            messages[client] = client_message(
                server.model,
                clients[client],
                work or LocalWork(),
                loss,
                seed=seed,
                round_number=round_number,
                client=client,
            )
        records.append(server.finish_round(round_number, messages, asked))
        if on_round is not None:
            on_round(records[-1])
    return records


def asked_clients(count: int, fraction: float, seed: int, round_number: int) -> tuple[int, ...]:
    """Return who is asked in a round: a sample without replacement, in order of their numbers.

    Args:
        count: How many clients there are, >= 1.
        fraction: Share that is asked, above 0 and at most 1; at least one is.
        seed: Of the run.
        round_number: The round.

    Returns:
        Their numbers, from 0.

    Raises:
        InvalidArgument: `fraction` is out of its range.

    Example:
        >>> asked_clients(5, 0.4, seed=0, round_number=1)
        (2, 3)
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise InvalidArgument(f"fraction must be above 0 and at most 1, got {fraction!r}")
    if fraction == 1:
        return tuple(range(count))
    generator = torch.Generator().manual_seed(seed_for(seed, SAMPLING, round_number) >> 1)
    chosen = torch.randperm(count, generator=generator)[: max(1, round(fraction * count))]
    return tuple(sorted(chosen.tolist()))
