"""What the two sides say to each other: the names of the records in a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from adadagrad.integrations.flower.arrays import to_record

ARRAYS, ROUND = "arrays", "round"
"""Of a request: the weights, and the round's number with the numbers of those who are asked."""
MESSAGE, CLIENT, METRICS = "message", "client", "metrics"
"""Of a reply: what the channel carries, who sends it, and what an evaluation found."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client reads from the server's message.

    Args:
        round_number: The round.
        asked: The numbers of those who are to answer; None for all.
    """

    round_number: int
    asked: tuple[int, ...] | None

    def content(self, arrays: ArrayRecord) -> RecordDict:
        """Return the records of a request.

        Args:
            arrays: The weights.
        """
        told = ConfigRecord({"number": self.round_number})
        if self.asked is not None:
            told["asked"] = list(self.asked)
        return RecordDict({ARRAYS: arrays, ROUND: told})

    @staticmethod
    def read(message: Message) -> Request:
        """Return the request in a message.

        Args:
            message: As `content` made it.
        """
        told: dict[str, Any] = dict(message.content.config_records[ROUND])
        return Request(told["number"], tuple(told["asked"]) if "asked" in told else None)


def reply_content(client: int, num_examples: int, tensors: Mapping[str, Tensor] | None) -> RecordDict:
    """Return the records of a client's reply to a request to train.

    Args:
        client: Its number.
        num_examples: How many it has.
        tensors: What it sends; None where it is not asked.
    """
    content = RecordDict({CLIENT: MetricRecord({"number": client, "num-examples": num_examples})})
    if tensors is not None:
        content[MESSAGE] = to_record(tensors)
    return content
