"""Federated training through a radio channel: what the channel does to gradients, who sends, and the server's step."""

from adadagrad.federated.channel import Channel
from adadagrad.federated.clients import LocalWork, client_message, dirichlet_split
from adadagrad.federated.server import RoundRecord, Server
from adadagrad.federated.simulation import simulate
from adadagrad.federated.stable import sample_alpha_stable
from adadagrad.federated.tail import ResidualTail, TailEstimate, estimate_tail

__all__ = [
    "Channel",
    "LocalWork",
    "ResidualTail",
    "RoundRecord",
    "Server",
    "TailEstimate",
    "client_message",
    "dirichlet_split",
    "estimate_tail",
    "sample_alpha_stable",
    "simulate",
]
