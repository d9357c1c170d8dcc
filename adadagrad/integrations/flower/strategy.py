"""A strategy of Flower whose aggregation is the over-the-air channel and whose step is a torch optimizer's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from adadagrad.core.checks import check_integer, check_positive
from adadagrad.core.errors import InvalidArgument
from adadagrad.federated.server import RoundRecord, Server
from adadagrad.federated.simulation import asked_clients
from adadagrad.integrations.flower.arrays import load, to_record, trained
from adadagrad.integrations.flower.replies import Round, mean_metrics, sort_replies
from adadagrad.integrations.flower.wire import Request

log = logging.getLogger(__name__)
POLL = 0.5
"""Seconds between two looks at who is connected."""


class OverTheAir(Strategy):
    """Send the weights, hear the clients through the server's channel, take one step; a round never waits for ever.

    A client that does not answer in time, is not connected, crashes, answers with an error or with arrays that do not
    fit or are not finite is left out of the round, with a warning in the log and the reason in the round's record. The
    round goes on with the others; one in which nothing is heard leaves the model alone.

    The trained parameters travel; buffers and frozen parameters of the server's model stay on the server. A client is
    believed the number that it says: who may connect at all is Flower's affair.

    Args:
        server: Model, optimizer and channel.
        num_clients: How many clients there are, numbered from 0. The first round waits for all of them, and a larger
            number in a reply is refused. None asks whoever is connected when a round begins.
        fraction: Share of the clients that is asked in a round, as in `adadagrad.federated.simulate`. Nodes whose
            number is not known yet get the message too; they answer with their number only, if they are not asked.
        seed: Of who is asked.
        first_round: Number of the first round: the channel's draws and the clients' orders depend on it, so a run that
            goes on where another ended counts on.
        min_clients: Later rounds wait until so many are connected.
        connect_timeout: Seconds to wait for clients before a round goes on without them.
        round_timeout: Seconds from the sending of the weights until a reply comes too late; the clocks of the machines
            must differ by less. Flower itself notices a node that has gone after a minute.
        evaluate_every: Ask all connected clients to evaluate after every so many rounds; 0 never does.
        on_round: Called with each round's record.

    Raises:
        InvalidArgument: An argument is out of its range, or `fraction` is below 1 without `num_clients`.

    Source: none; the loop is that of `adadagrad.federated.simulate`.
    """

    def __init__(
        self,
        server: Server,
        *,
        num_clients: int | None = None,
        fraction: float = 1.0,
        seed: int = 0,
        first_round: int = 1,
        min_clients: int = 1,
        connect_timeout: float = 60.0,
        round_timeout: float = 600.0,
        evaluate_every: int = 0,
        on_round: Callable[[RoundRecord], None] | None = None,
    ) -> None:
        if num_clients is not None:
            check_integer(1, num_clients=num_clients)
        check_integer(0, seed=seed, first_round=first_round, evaluate_every=evaluate_every)
        check_integer(1, min_clients=min_clients)
        check_positive(connect_timeout=connect_timeout, round_timeout=round_timeout)
        asked_clients(1, fraction, seed, first_round)  # refuses a fraction out of its range
        if fraction < 1 and num_clients is None:
            raise InvalidArgument(f"fraction = {fraction} needs num_clients: say how many clients there are")
        self.server = server
        self.num_clients = num_clients
        self.fraction = fraction
        self.seed = seed
        self.first_round = first_round
        self.min_clients = min_clients
        self.connect_timeout = connect_timeout
        self.round_timeout = round_timeout
        self.evaluate_every = evaluate_every
        self.on_round = on_round
        self.records: list[RoundRecord] = []
        self._numbers: dict[int, int] = {}
        """The number of each node that has ever said it."""
        self._asked: tuple[int, ...] | None = None
        self._sent: list[Message] = []
        self._arrays: ArrayRecord | None = None

    def arrays(self) -> ArrayRecord:
        """Return the server's trained parameters, as Flower's strategies take and return them."""
        return to_record(trained(self.server.model))

    def run(self, grid: Grid, rounds: int, **options: Any) -> Result:
        """Run rounds from the server's weights.

        Args:
            grid: Of Flower's ServerApp.
            rounds: How many, >= 0.
            **options: More for Flower's `Strategy.start`, such as ``evaluate_fn``.

        Returns:
            Flower's result; the rounds' records are in `records`.
        """
        check_integer(0, rounds=rounds)
        options = {"timeout": self.round_timeout, **options}
        return self.start(grid, self.arrays(), num_rounds=rounds, **options)

    def summary(self) -> None:
        """Log what Flower shows before the first round."""
        log.info(
            "over the air: %s, %s, clients %s, fraction %s",
            type(self.server.optimizer).__name__,
            self.server.channel,
            self.num_clients,
            self.fraction,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages that open a round: one for each node that is asked or whose number is unknown.

        Args:
            server_round: Flower's number of the round, from 1.
            arrays: The weights. Where they are not those that the last round returned, the model takes them over.
            config: Not used: what clients do is fixed when their app is made.
            grid: Knows who is connected.

        Raises:
            InvalidArgument: The arrays do not fit the model.
        """
        if arrays is not self._arrays:
            load(self.server.model, arrays)
            self._arrays = self.arrays()
        number = self._round_number(server_round)
        everybody = self.num_clients is not None and not self.records
        nodes = self._connected(grid, self.num_clients if everybody and self.num_clients else self.min_clients)
        self._asked = None
        if self.num_clients is not None:
            self._asked = asked_clients(self.num_clients, self.fraction, self.seed, number)
        chosen = [
            node
            for node in nodes
            if self._asked is None or node not in self._numbers or self._numbers[node] in self._asked
        ]
        log.info("round %d: %d of %d connected nodes are asked", number, len(chosen), len(nodes))
        request = Request(number, self._asked if self.fraction < 1 else None)
        self._sent = self._messages(request, self._arrays, chosen, MessageType.TRAIN)
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Close a round with what has come back, in any order, and take the step.

        Args:
            server_round: Flower's number of the round.
            replies: Of any content.

        Returns:
            The new weights, and how many answered and were left out, with the norm of what was heard [grad].
        """
        number = self._round_number(server_round)
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in self._sent}
        known = Round(trained(self.server.model), nodes, self.num_clients, self._asked)
        found = sort_replies(replies, known, self._numbers)
        late = f"no reply within {self.round_timeout:g} s"
        faults = {self._numbers[node]: late for node in found.silent if node in self._numbers} | found.faults
        strangers = {node: late for node in found.silent if node not in self._numbers} | found.strangers
        for node, fault in sorted(strangers.items()):
            log.warning("round %d: node %d is left out: %s", number, node, fault)
        asked = {*(self._asked or ()), *found.messages, *faults}
        record = self.server.finish_round(number, found.messages, sorted(asked), faults)
        self.records.append(record)
        if self.on_round is not None:
            self.on_round(record)
        self._arrays = self.arrays()
        told = MetricRecord({"answered": len(record.answered), "left-out": len(record.left_out)})
        if record.grad_norm is not None:
            told["grad-norm"] = record.grad_norm
        return self._arrays, told

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages that ask all connected nodes to evaluate, in the rounds that do.

        Args:
            server_round: Flower's number of the round.
            arrays: The weights.
            config: Not used.
            grid: Knows who is connected.
        """
        if self.evaluate_every == 0 or server_round % self.evaluate_every != 0:
            return []
        request = Request(self._round_number(server_round), None)
        return self._messages(request, arrays, sorted(grid.get_node_ids()), MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the means of what the clients found, weighted by their numbers of examples; None if nothing was.

        Args:
            server_round: Flower's number of the round.
            replies: Of any content.
        """
        means, faults = mean_metrics(list(replies))
        for fault in faults:
            log.warning("round %d: left out of the evaluation: %s", self._round_number(server_round), fault)
        return MetricRecord(dict(means)) if means else None

    def _round_number(self, server_round: int) -> int:
        return server_round + self.first_round - 1

    def _connected(self, grid: Grid, wanted: int) -> list[int]:
        """Wait for nodes, but not for ever."""
        start = time.monotonic()
        while len(nodes := sorted(grid.get_node_ids())) < wanted:
            if time.monotonic() - start > self.connect_timeout:
                log.warning(
                    "%d of %d clients are connected after %.0f s: the round goes on with them",
                    len(nodes),
                    wanted,
                    self.connect_timeout,
                )
                break
            time.sleep(POLL)
        return nodes

    def _messages(self, request: Request, arrays: ArrayRecord | None, nodes: Sequence[int], kind: str) -> list[Message]:
        if not nodes:
            return []
        content = request.content(arrays if arrays is not None else self.arrays())
        group = str(request.round_number)
        return [Message(content, node, kind, ttl=self.round_timeout, group_id=group) for node in nodes]
