"""What is trained in the Flower example: softmax regression on digits or MNIST, split unevenly among clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from adadagrad.cli.data import load_data
from adadagrad.federated import Channel, LocalWork, RoundRecord, Server, dirichlet_split, simulate
from adadagrad.optimizers import OverTheAirAdam


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Clients, server and channel of a run: plain values, from which each process makes the same objects.

    Args:
        data: ``digits``, ``mnist:DIR``, or ``blobs``: 400 made-up examples of 4 classes in 8 dimensions.
        clients: How many.
        concentration: Of the Dirichlet split.
        seed: Of model, split, clients and channel.
        alpha: Tail index of the channel, and of the server's optimizer.
        scale: Of the channel.
        lr: Of the server.
        message: What clients send.
    """

    data: str = "digits"
    clients: int = 50
    concentration: float = 0.1
    seed: int = 0
    alpha: float = 1.5
    scale: float = 0.01
    lr: float = 0.02
    message: Literal["gradient", "drift"] = "gradient"

    @property
    def work(self) -> LocalWork:
        """What clients do in a round."""
        return LocalWork(message=self.message, batch_size=512)

    def model(self) -> nn.Module:
        """Return the model at its start."""
        inputs, labels = examples(self.data)[0].tensors
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return nn.Linear(inputs.shape[1], 1 + int(labels.max()))

    def dataset(self, number: int, count: int) -> Dataset[Any]:
        """Return a client's examples.

        Args:
            number: The client's.
            count: How many clients there are.
        """
        train = examples(self.data)[0]
        parts = dirichlet_split(train.tensors[1], count, self.concentration, seed=self.seed)
        return TensorDataset(*(tensor[parts[number]] for tensor in train.tensors))

    def server(self) -> Server:
        """Return a server at its start."""
        model = self.model()
        optimizer = OverTheAirAdam(model.parameters(), lr=self.lr, alpha=self.alpha)
        return Server(model, optimizer, Channel(alpha=self.alpha, scale=self.scale, seed=self.seed))

    def in_process(
        self, rounds: int, drops_out: Callable[[int, int], bool] | None = None
    ) -> tuple[dict[str, Tensor], list[RoundRecord]]:
        """Return the weights after rounds in this process, and the records.

        Args:
            rounds: How many.
            drops_out: Says of round and client whether it does not answer.
        """
        server = self.server()
        clients = [self.dataset(number, self.clients) for number in range(self.clients)]
        records = simulate(server, clients, loss, rounds=rounds, work=self.work, seed=self.seed, drops_out=drops_out)
        return dict(server.model.state_dict()), records

    def accuracy(self, weights: dict[str, Tensor]) -> float:
        """Return the share of held-out examples that weights get right.

        Args:
            weights: Of the model, by name.
        """
        inputs, labels = examples(self.data)[1].tensors
        model = self.model()
        model.load_state_dict(weights)
        with torch.no_grad():
            return float((model(inputs).argmax(1) == labels).float().mean())


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the mean cross entropy.

    Args:
        model: Any classifier.
        batch: Inputs and labels.
    """
    return F.cross_entropy(model(batch[0]), batch[1])


@lru_cache(maxsize=1)
def examples(data: str) -> tuple[TensorDataset, TensorDataset]:
    """Return examples to train on and held-out ones, each a vector and a class number.

    Args:
        data: As `Federation.data`.
    """
    if data == "blobs":
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(400) % 4
        centres = 2 * torch.randn(4, 8, generator=generator)
        inputs = centres[labels] + torch.randn(400, 8, generator=generator)
        return TensorDataset(inputs[:320], labels[:320]), TensorDataset(inputs[320:], labels[320:])
    source = load_data(data)
    pairs = (source.train, source.held_out)
    train, held_out = (part for part in pairs if isinstance(part, TensorDataset))
    return flat(train), flat(held_out)


def flat(part: TensorDataset) -> TensorDataset:
    """Return examples with each input as a vector.

    Args:
        part: Inputs and labels.
    """
    inputs, labels = part.tensors
    return TensorDataset(inputs.flatten(1), labels)
