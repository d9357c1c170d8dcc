"""A grid of Flower in this process: requests go straight into the clients' apps, replies can be spoilt on the way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from adadagrad.federated import Channel, Server
from adadagrad.optimizers import OverTheAirAdam

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'adadagrad[flower]'")

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

Spoil = Callable[[int, Message, Message], Message | None]
"""Takes the client's number, the request and the reply; returns what arrives, None for nothing."""


class FakeGrid(Grid):
    """Nodes with large numbers, as Flower's are, whose replies arrive in another order each round.

    Args:
        app: Of every client.
        count: How many clients.
        spoil: What happens to a reply on its way.
    """

    def __init__(self, app: ClientApp, count: int, spoil: Spoil | None = None) -> None:
        self.app = app
        self.numbers = {7919 * (count - number) + 10**9: number for number in range(count)}
        self.places: dict[int, Any] = {
            node: {"partition-id": number, "num-partitions": count} for node, number in self.numbers.items()
        }
        self.spoil = spoil
        self.connected = list(self.numbers)
        self.requests: list[list[Message]] = []
        self.order = random.Random(0)

    def get_node_ids(self) -> Iterable[int]:
        self.order.shuffle(self.connected)
        return list(self.connected)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self.requests.append(list(messages))
        replies = []
        for count, request in enumerate(self.requests[-1]):
            request.metadata.__dict__["_message_id"] = f"{len(self.requests)}-{count}"
            node = request.metadata.dst_node_id
            context = Context(1, node, self.places[node], RecordDict(), {})
            try:
                reply: Message | None = self.app(request, context)
            except Exception as error:  # as Flower's runtimes do
                reply = Message(Error(1, repr(error)), reply_to=request)
            if self.spoil is not None and reply is not None:
                reply = self.spoil(self.numbers[node], request, reply)
            if reply is not None:
                replies.append(reply)
        self.order.shuffle(replies)
        return replies

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def make_model() -> nn.Module:
    """A model with a buffer, a frozen parameter and random numbers in its forward."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))
    model[3].bias.requires_grad_(False)
    return model


def make_dataset(number: int, count: int) -> TensorDataset:
    """Seven to ten examples, other ones for each client; in batches of five none is alone, which BatchNorm refuses."""
    generator = torch.Generator().manual_seed(100 * count + number)
    size = 7 + number % 4
    inputs = torch.randn(size, 4, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (size,), generator=generator))


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Mean cross entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_server(lr: float = 0.05, scale: float = 0.1) -> Server:
    """A server with the library's optimizer behind a channel with fading and noise."""
    return server_of(make_model(), lr, scale)


def server_of(model: nn.Module, lr: float = 0.05, scale: float = 0.1) -> Server:
    """The same with a model of one's own."""
    params = [param for param in model.parameters() if param.requires_grad]
    return Server(model, OverTheAirAdam(params, lr=lr), Channel(scale=scale, seed=5))


def trained_weights(server: Server) -> dict[str, Tensor]:
    """All of the model's state, cloned."""
    return {name: tensor.clone() for name, tensor in server.model.state_dict().items()}
