"""A client of Flower that answers the strategy: a gradient, or a drift, over the examples of one partition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import Dataset

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.federated.clients import LocalWork, Loss, batches, client_message
from adadagrad.integrations.flower.arrays import load
from adadagrad.integrations.flower.wire import ARRAYS, CLIENT, METRICS, Request, reply_content

MakeDataset = Callable[[int, int], Dataset[Any]]
Evaluate = Callable[[nn.Module, Dataset[Any]], Mapping[str, float]]


def client_app(
    make_model: Callable[[], nn.Module],
    make_dataset: MakeDataset,
    loss: Loss,
    work: LocalWork | None = None,
    *,
    seed: int = 0,
    evaluate: Evaluate | None = None,
) -> ClientApp:
    """Return a ClientApp that sends what `adadagrad.federated.client_message` makes.

    A client's number is the ``partition-id`` of its node, which Flower's simulation sets; on a machine of its own a
    node is started with ``--node-config "partition-id=3 num-partitions=10"``. The functions are called in each round
    anew, because a client may live in a process for one round only: let them be quick, and make the same each time.

    Args:
        make_model: Makes the server's model; its trained parameters are then set to the server's.
        make_dataset: Makes the client's examples from its number and the number of clients.
        loss: A function of the model and a batch: the mean loss over the batch.
        work: What to do in a round; None sends the gradient over all examples.
        seed: Of the run, the same for all clients.
        evaluate: Returns numbers by name, for the rounds in which the strategy asks for them; the server averages each
            with the clients' numbers of examples as weights. None finds the mean loss, under the name ``loss``.

    Returns:
        The app. An exception in a function of yours becomes an error reply, and the server leaves the client out.

    Raises:
        InvalidArgument: `seed` is no integer >= 0.

    Source: none.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.ones(4, 1))
        >>> mean = lambda model, batch: model(batch[0]).mean()
        >>> type(client_app(lambda: nn.Linear(1, 1), lambda number, count: data, mean)).__name__
        'ClientApp'
    """
    check_integer(0, seed=seed)
    client = _Client(make_model, make_dataset, loss, work or LocalWork(), seed, evaluate)
    app = ClientApp()
    app.train()(client.train)
    app.evaluate()(client.evaluate)
    return app


@dataclass(frozen=True)
class _Client:
    """The two answers of a client; an object of plain functions, because Flower's simulation pickles it."""

    make_model: Callable[[], nn.Module]
    make_dataset: MakeDataset
    loss: Loss
    work: LocalWork
    seed: int
    own_evaluate: Evaluate | None

    def train(self, message: Message, context: Context) -> Message:
        """Answer with what the channel carries.

        Args:
            message: The weights and the round.
            context: Holds the client's number.

        Returns:
            The client's number with its gradient or drift, or the number alone where it is not asked.
        """
        number, count = _place(context)
        request = Request.read(message)
        data = self.make_dataset(number, count)
        size = len(data)  # type: ignore[arg-type]
        if request.asked is not None and number not in request.asked:
            return Message(reply_content(number, size, None), reply_to=message)
        model = self.make_model()
        load(model, message.content.array_records[ARRAYS])
        tensors = client_message(
            model, data, self.work, self.loss, seed=self.seed, round_number=request.round_number, client=number
        )
        return Message(reply_content(number, size, tensors), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Answer with what the server's weights do on the client's examples.

        Args:
            message: The weights.
            context: Holds the client's number.

        Returns:
            The numbers that were found, with how many examples they are of.
        """
        number, count = _place(context)
        data = self.make_dataset(number, count)
        model = self.make_model()
        load(model, message.content.array_records[ARRAYS])
        model.eval()
        with torch.no_grad():
            found = self.own_evaluate(model, data) if self.own_evaluate else {"loss": self._mean_loss(model, data)}
        told = {name: float(value) for name, value in found.items()}
        content = RecordDict({CLIENT: MetricRecord({"number": number})})
        content[METRICS] = MetricRecord({**told, "num-examples": len(data)})  # type: ignore[arg-type]
        return Message(content, reply_to=message)

    def _mean_loss(self, model: nn.Module, data: Dataset[Any]) -> float:
        size = len(data)  # type: ignore[arg-type]
        parts = torch.split(torch.arange(size), self.work.batch_size)
        losses = [self.loss(model, batch) for batch in batches(data, torch.arange(size), self.work.batch_size)]
        return sum(len(part) * float(one) for part, one in zip(parts, losses, strict=True)) / size


def _place(context: Context) -> tuple[int, int]:
    """Return the client's number and how many clients there are, as its node was told."""
    told = context.node_config
    number, count = told.get("partition-id"), told.get("num-partitions")
    if not isinstance(number, int) or not isinstance(count, int):
        raise InvalidArgument(
            f"the node must know its partition-id and num-partitions, got {dict(told)}: start it with "
            '--node-config "partition-id=0 num-partitions=10"'
        )
    return number, count
