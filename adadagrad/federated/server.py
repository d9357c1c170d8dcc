"""The server's part of a federated round: listen through the channel, take a step, write down what happened."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument, InvalidMeasurement
from adadagrad.core.vectors import squared_norm
from adadagrad.federated.channel import Channel, Message
from adadagrad.federated.tail import ResidualTail, TailEstimate
from adadagrad.optimizers.over_the_air import OverTheAirAdaGrad, OverTheAirAdam

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """What happened in one round.

    Args:
        round_number: From 1.
        asked: Numbers of the clients that were to send.
        answered: Of those whose messages were added up.
        left_out: Of the others, with the reason.
        grad_norm: Norm of what the server heard [grad]; None where that is nothing, or not finite: the model has stayed
            as it was.
        tail: Estimate of the noise on what was heard so far; None unless it is followed and known.
    """

    round_number: int
    asked: tuple[int, ...]
    answered: tuple[int, ...]
    left_out: Mapping[int, str] = field(default_factory=dict)
    grad_norm: float | None = None
    tail: TailEstimate | None = None


class Server:
    """Hold the model, hear the clients through the channel, and step.

    A client that is missing, or whose message does not fit or is not finite, is left out of the round, with a warning
    in the log and the reason in the record; the mean is over those that remain. A round in which nothing is heard
    leaves model and optimizer alone.

    Args:
        model: Its trainable parameters are trained. Buffers stay as they are, since no message carries them: a warning
            names the first layer that keeps running statistics, such as BatchNorm, which evaluation would use.
        optimizer: Over parameters of the model: `OverTheAirAdam`, or any other that needs no closure.
        channel: What lies between the clients and the server; None is a plain mean.
        follow_tail: Estimate the tail index of the channel's noise from differences of what is heard in pairs of rounds
            (`ResidualTail`) and, from 100 residuals on, use it as `alpha` of the optimizer.

    Raises:
        InvalidArgument: The model has nothing to train, or the optimizer trains something that is not in the model, or
            has no `alpha` to follow with.

    Source: the loop of arXiv 2403.06528 (second-hand). Following the tail is ours.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> server = Server(model, torch.optim.SGD(model.parameters(), lr=1.0))
        >>> before = model.weight.item()
        >>> record = server.finish_round(1, {0: {"weight": torch.tensor([[2.0]])}}, asked=[0, 1])
        >>> round(before - model.weight.item(), 4), record.left_out
        (2.0, {1: 'no message'})
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        channel: Channel | None = None,
        *,
        follow_tail: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.channel = channel or Channel(scale=0.0, fading="none")
        self.tail = ResidualTail() if follow_tail else None
        self._params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        known = {id(param) for param in model.parameters()}  # frozen ones may be in the optimizer, and stay
        running = [name for name, module in model.named_modules() if getattr(module, "track_running_stats", False)]
        if running:
            warnings.warn(
                f"the running statistics of {running[0]} stay as they are, because no message carries them: use "
                "GroupNorm, or batch statistics in evaluation too (track_running_stats=False)",
                stacklevel=2,
            )
        if not self._params:
            raise InvalidArgument("model must have a parameter that requires a gradient: there is nothing to train")
        if any(id(param) not in known for group in optimizer.param_groups for param in group["params"]):
            raise InvalidArgument("optimizer trains parameters that are not the model's: make it of model.parameters()")
        if follow_tail and not isinstance(optimizer, OverTheAirAdaGrad | OverTheAirAdam):
            raise InvalidArgument(
                f"follow_tail needs an optimizer with an alpha, such as OverTheAirAdam, got {type(optimizer).__name__}"
            )

    def finish_round(
        self,
        round_number: int,
        messages: Mapping[int, Message],
        asked: Sequence[int] | None = None,
        reasons: Mapping[int, str] | None = None,
    ) -> RoundRecord:
        """Add up what has arrived and take one step.

        Args:
            round_number: >= 0; the channel's draws depend on it.
            messages: By the client's number, in any order.
            asked: Who was to send; None for those who did.
            reasons: Why some of them sent nothing, where it is known.

        Returns:
            What happened.
        """
        check_integer(0, round_number=round_number)
        expected = tuple(sorted({*messages, *(asked or ())}))
        known = reasons or {}
        left_out = {client: known.get(client, "no message") for client in expected if client not in messages}
        usable: dict[int, Message] = {}
        for client in sorted(messages):
            fault = self._misfit(messages[client])
            if fault is None:
                moved = {name: messages[client][name].to(p.device, p.dtype) for name, p in self._params.items()}
                infinite = [name for name, tensor in moved.items() if not bool(tensor.isfinite().all())]
                fault = f"{infinite[0]} is not finite" if infinite else None
            if fault is None:
                usable[client] = moved
            else:
                left_out[client] = fault
        for client, reason in sorted(left_out.items()):
            log.warning("round %d: client %d is left out: %s", round_number, client, reason)
        if not usable:
            log.warning("round %d: no message could be used, the model stays as it is", round_number)
            return RoundRecord(round_number=round_number, asked=expected, answered=(), left_out=left_out)
        heard = self.channel.aggregate(usable, round_number)
        if not all(bool(tensor.isfinite().all()) for tensor in heard.values()):
            log.warning("round %d: what was heard is not finite, the model stays as it is", round_number)
            return RoundRecord(
                round_number=round_number, asked=expected, answered=tuple(usable), left_out=left_out, grad_norm=None
            )
        tail = self._follow(heard)
        self._step(heard)
        return RoundRecord(
            round_number=round_number,
            asked=expected,
            answered=tuple(usable),
            left_out=left_out,
            grad_norm=float(squared_norm(list(heard.values())).sqrt()),
            tail=tail,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimizer and what is known of the tail; the channel has no state."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tail": None if self.tail is None else self.tail.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state.

        Args:
            state_dict: What `state_dict` returned.
        """
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.tail is not None:
            self.tail = ResidualTail()
            if state_dict["tail"] is not None:
                self.tail.load_state_dict(state_dict["tail"])

    def _misfit(self, message: Message) -> str | None:
        """Say in a few words where a message has other names or shapes than the model; None if nowhere."""
        if set(message) != set(self._params):
            wrong = sorted(set(message) ^ set(self._params))
            return f"names differ from the model's at {wrong[0]}"
        for name, param in self._params.items():
            if message[name].shape != param.shape:
                return f"{name} has shape {tuple(message[name].shape)}, not {tuple(param.shape)}"
        return None

    def _follow(self, heard: Mapping[str, Tensor]) -> TailEstimate | None:
        if self.tail is None:
            return None
        self.tail.update(heard)
        try:
            found = self.tail.estimate()
        except InvalidMeasurement:  # too few residuals yet
            return None
        for group in self.optimizer.param_groups:
            group["alpha"] = found.usable_alpha
        return found

    def _step(self, heard: Mapping[str, Tensor]) -> None:
        for name, param in self._params.items():
            param.grad = heard[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
