r"""The radio channel of over-the-air federated learning: it adds what clients send, with fading and interference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adadagrad.core.checks import check_at_least, check_choice, check_integer, check_tail_index
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.mixing import seed_for
from adadagrad.core.shards import all_plain
from adadagrad.core.vectors import HALVES
from adadagrad.federated.stable import sample_alpha_stable

RAYLEIGH = math.sqrt(2 / math.pi)
"""The parameter of the Rayleigh distribution whose mean is 1; its variance is (4 - pi) / pi."""
FADING, NOISE = 0, 1
"""Words that keep the two kinds of draws of a round apart."""

Message = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    r"""Add the messages of all clients in the air: a faded mean with heavy-tailed noise on it.

    .. math:: g_t = \frac{1}{N} \sum_{n=1}^N h_{n,t} m_{n,t} + \xi_t

    In code: m_n,t are the messages of round t, N how many there are, h_n,t one number for each client and round with
    mean 1 (Rayleigh fading, variance 0.273), xi_t independent for each coordinate, symmetric alpha-stable of tail
    index `alpha` and scale `scale` (`sample_alpha_stable`). More clients average their own noise away, and not xi.

    All draws are functions of `seed`, the round and the client's number alone: the channel keeps no state, a run that
    is resumed hears the same noise, a client that is missing changes nobody else's fading, and the order of arrival
    does not matter. They are made on the device of the messages; another kind of device draws other numbers.

    Statistics of what comes out have no variance to estimate below alpha = 2: let no batch size test read them.

    Args:
        alpha: Tail index of the interference, above 1 and at most 2.
        scale: c, >= 0 [unit of the messages]; 0 for none. At alpha = 2 the noise has variance 2 c^2.
        fading: ``"rayleigh"``, or ``"none"`` for h = 1.
        noise_on: ``"mean"`` adds xi to the mean, as the formula; ``"sum"`` to the sum, so that the division by N makes
            it N times weaker.
        seed: Of all draws.

    Raises:
        InvalidArgument: An argument is out of its range.
        UnknownName: `fading` or `noise_on` is none of the words above.

    Source: Wang, Chen, Pappas, Yang, Quek, Poor (2024), arXiv 2403.06528 (second-hand: only the abstract was
        readable); noise on the sum: the repository Promissa/st4001_project (second-hand).
    Differs from the paper: no.

    Example:
        >>> messages = {0: {"w": torch.tensor([1.0])}, 1: {"w": torch.tensor([3.0])}}
        >>> Channel(scale=0.0, fading="none").aggregate(messages, round_number=1)
        {'w': tensor([2.])}
        >>> quiet = Channel(scale=0.0, seed=1)
        >>> round(sum(quiet.fading_of(client, 1) for client in range(1000)) / 1000, 1)
        1.0
    """

    alpha: float = 1.5
    scale: float = 0.1
    fading: Literal["rayleigh", "none"] = "rayleigh"
    noise_on: Literal["mean", "sum"] = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        check_tail_index(alpha=self.alpha)
        check_at_least(0, scale=self.scale)
        check_choice("fading", self.fading, ("rayleigh", "none"))
        check_choice("noise_on", self.noise_on, ("mean", "sum"))
        check_integer(0, seed=self.seed)

    def fading_of(self, client: int, round_number: int) -> float:
        """Return h of one client in one round: dimensionless, of mean 1.

        Args:
            client: Its number, >= 0.
            round_number: The round, >= 0.
        """
        if self.fading == "none":
            return 1.0
        uniform = (seed_for(self.seed, FADING, round_number, client) >> 11) * 2.0**-53
        return RAYLEIGH * math.sqrt(-2 * math.log1p(-uniform))

    def noise_like(self, tensors: Message, round_number: int) -> dict[str, Tensor]:
        """Return xi of a round, before any division: a tensor for each of a message's.

        Args:
            tensors: Shapes, devices and dtypes by name; drawn in the order of the names.
            round_number: The round, >= 0.
        """
        generators: dict[torch.device, torch.Generator] = {}
        drawn = {}
        for name in sorted(tensors):
            tensor = tensors[name]
            if tensor.device not in generators:
                more = (len(generators),) if generators else ()  # devices of one kind draw different numbers
                seed = seed_for(self.seed, NOISE, round_number, *more) >> 1  # torch takes signed 64-bit seeds
                generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
            drawn[name] = sample_alpha_stable(
                tensor.shape,
                self.alpha,
                self.scale,
                generator=generators[tensor.device],
                device=tensor.device,
                dtype=tensor.dtype,
            )
        return drawn

    @torch.no_grad()
    def aggregate(self, messages: Mapping[int, Message], round_number: int) -> dict[str, Tensor]:
        """Return what the server hears in one round.

        Args:
            messages: By the number of the client; each has the same names, and the same shapes by name.
            round_number: The round, >= 0: the draws depend on it.

        Returns:
            The faded mean with the noise on it, by name, in the dtype of the messages; half-precision ones are added up
            in float32. Not finite where the noise, or the sum, is beyond the dtype.

        Raises:
            InvalidArgument: There is no message, one is sharded, or two of them differ in names or shapes.
        """
        first = _alike(messages)
        heard = {name: torch.zeros_like(tensor, dtype=wide(tensor.dtype)) for name, tensor in first.items()}
        for client in sorted(messages):  # in one order: sums of floating-point numbers depend on it
            gain = self.fading_of(client, round_number)
            for name, total in heard.items():
                total.add_(messages[client][name].to(total.dtype), alpha=gain)
        count = len(messages)
        for total in heard.values():
            total.div_(count)
        if self.scale > 0:
            for name, noise in self.noise_like(heard, round_number).items():
                heard[name].add_(noise, alpha=1 if self.noise_on == "mean" else 1 / count)
        return {name: total.to(first[name].dtype) for name, total in heard.items()}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of another one are added up: float32 for half precision.

    Args:
        dtype: Of floating-point numbers.

    Example:
        >>> wide(torch.bfloat16), wide(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in HALVES else dtype


def _alike(messages: Mapping[int, Message]) -> Message:
    """Return one of the messages, once all are known to have the same names and shapes."""
    if not messages:
        raise InvalidArgument("messages must hold at least one client's: leave the model alone in a round without any")
    clients = sorted(messages)
    first = messages[clients[0]]
    shapes = {name: tensor.shape for name, tensor in first.items()}
    if not all_plain([tensor for client in clients for tensor in messages[client].values()]):
        raise InvalidArgument("messages must hold plain tensors, got a DTensor: send its full_tensor()")
    for client in clients[1:]:
        other = {name: tensor.shape for name, tensor in messages[client].items()}
        if other != shapes:
            raise InvalidArgument(
                f"messages must all have the same names and shapes, got {_shown(shapes)} from client {clients[0]} and "
                f"{_shown(other)} from client {client}"
            )
    return first


def _shown(shapes: Mapping[str, torch.Size]) -> str:
    return "{" + ", ".join(f"{name}: {tuple(shape)}" for name, shape in sorted(shapes.items())) + "}"
