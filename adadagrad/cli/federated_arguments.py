"""The flags of ``adadagrad federated``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from adadagrad.optimizers import OverTheAirAdaGrad, OverTheAirAdam


@dataclass(frozen=True, kw_only=True)
class FederatedProblem:
    """What is trained, and how its data lie.

    Args:
        data: digits, mnist:DIR, or package.module:function that returns (training data, validation data).
        model: logistic, mlp, cnn, or package.module:function that returns a module.
        clients: How many clients the training data are split among.
        concentration: Of the Dirichlet distribution of each class over the clients: 0.1 leaves most clients a few
            classes, 100 makes all alike.
    """

    data: str = "digits"
    model: str = "logistic"
    clients: int = 50
    concentration: float = 0.1


@dataclass(frozen=True, kw_only=True)
class ChannelOptions:
    """The radio channel between clients and server.

    Args:
        tail_index: alpha of the noise, above 1 and at most 2; smaller is heavier.
        noise_scale: c of the noise; 0 for none.
        fading: Rayleigh fading of mean 1 for each client and round, or none.
        noise_on: Noise on the mean of what is sent, or on its sum (weaker by the number of clients).
    """

    tail_index: float = 1.5
    noise_scale: float = 0.1
    fading: Literal["rayleigh", "none"] = "rayleigh"
    noise_on: Literal["mean", "sum"] = "mean"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """The server's step.

    Args:
        server: adam-ota, adagrad-ota, fedavg, fedavgm, adagrad or adam.
        lr: Its learning rate: the methods differ in their best ones.
        power: alpha of the step [adam-ota, adagrad-ota], above 1 and at most 2; need not be the channel's.
        follow_tail: Estimate the channel's tail index, and use it as the power [adam-ota, adagrad-ota].
    """

    server: str = "adam-ota"
    lr: float = 0.01
    power: float = 1.5
    follow_tail: bool = False


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """What clients do in a round.

    Args:
        message: Send the gradient over all examples, or the drift of local epochs.
        local_epochs: Passes over a client's examples [drift].
        local_lr: Learning rate of its gradient descent [drift].
        local_batch_size: Examples in one of its steps [drift], and in one forward.
        share: Share of the clients that is asked in each round.
        drop_out: Probability that a client that was asked does not answer, as a rehearsal.
    """

    message: Literal["gradient", "drift"] = "gradient"
    local_epochs: int = 1
    local_lr: float = 0.1
    local_batch_size: int = 256
    share: float = 1.0
    drop_out: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FederatedRun:
    """How long, and where results go.

    Args:
        rounds: How many.
        evaluations: Evaluations on held-out data, evenly over the rounds.
        seed: Of the split, the weights, the channel and the clients.
        out: Directory to make; without it a numbered one under runs/.
    """

    rounds: int = 200
    evaluations: int = 20
    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class FederatedCommand:
    """Train by federated rounds through a radio channel with fading and heavy-tailed noise, simulated in this process.

    Leaves the settings, a line for each round, the model and a page. The same rounds between machines:
    adadagrad.integrations.flower.
    """

    problem: FederatedProblem = field(default_factory=FederatedProblem)
    channel: ChannelOptions = field(default_factory=ChannelOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    client: ClientOptions = field(default_factory=ClientOptions)
    run: FederatedRun = field(default_factory=FederatedRun)


SERVERS: Mapping[str, Callable[[Iterable[nn.Parameter], ServerOptions], torch.optim.Optimizer]] = {
    "adam-ota": lambda params, o: OverTheAirAdam(params, o.lr, o.power),
    "adagrad-ota": lambda params, o: OverTheAirAdaGrad(params, o.lr, o.power),
    "fedavg": lambda params, o: torch.optim.SGD(params, lr=o.lr),
    "fedavgm": lambda params, o: torch.optim.SGD(params, lr=o.lr, momentum=0.9),
    "adagrad": lambda params, o: torch.optim.Adagrad(params, lr=o.lr),
    "adam": lambda params, o: torch.optim.Adam(params, lr=o.lr),
}
"""What ``--server`` may name: plain averaging without and with momentum 0.9, torch's own, and the powers."""
WITH_POWER = ("adam-ota", "adagrad-ota")
DRIFT_ONLY = ("local_epochs", "local_lr")
