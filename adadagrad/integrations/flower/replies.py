"""How clients' replies are read, whatever they hold: nothing that a client sends raises an error on the server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from flwr.app import Message, RecordDict
from torch import Tensor

from adadagrad.core.errors import InvalidArgument
from adadagrad.integrations.flower.arrays import from_record
from adadagrad.integrations.flower.wire import CLIENT, MESSAGE, METRICS


@dataclass(frozen=True, slots=True)
class Round:
    """What the server knows of a round before the replies come.

    Args:
        like: Names, shapes, dtypes and devices of the tensors that are to come.
        nodes: The node that each message went to, by the message's id.
        num_clients: How many clients there are; None if any number will do.
        asked: The numbers of those who are to send; None for all.
    """

    like: Mapping[str, Tensor]
    nodes: Mapping[str, int]
    num_clients: int | None
    asked: tuple[int, ...] | None


@dataclass(slots=True)
class Replies:
    """What has come back, sorted.

    Args:
        messages: What can be used, by the client's number.
        faults: What is wrong with the reply of a client that was to send, by its number.
        strangers: The same for nodes of which no such number is known.
        silent: Nodes without any reply.
    """

    messages: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)
    strangers: dict[int, str] = field(default_factory=dict)
    silent: tuple[int, ...] = ()


def sort_replies(replies: Iterable[Message], known: Round, numbers: dict[int, int]) -> Replies:
    """Read the replies to one round's requests.

    Args:
        replies: Of any content, in any order.
        known: Of the round.
        numbers: The client's number of each node that has ever said it; those that say it now are added.

    Returns:
        The sorted replies. Where two nodes claim one number, the reply of the lower node that can be used counts.
    """
    found = Replies()
    by_node = sorted(((_sender(one, known.nodes), one) for one in replies), key=lambda pair: pair[0])
    found.silent = tuple(sorted(set(known.nodes.values()) - {node for node, _ in by_node}))
    for node, message in by_node:
        said = _number(message.content) if message.has_content() else None
        if said is not None and known.num_clients is not None and said >= known.num_clients:
            found.strangers[node] = f"its number {said} is not below num_clients = {known.num_clients}"
            continue
        if said is not None:
            numbers[node] = said
        client = numbers.get(node)
        tensors, fault = _tensors(message, said, known.like)
        if client is None:
            found.strangers[node] = fault or "the reply does not say whose it is"
        elif known.asked is not None and client not in known.asked:
            if tensors is not None:
                found.strangers[node] = f"client {client} was not asked"
        elif client in found.messages:
            found.strangers[node] = f"another node is client {client} too"
        elif tensors is not None:
            found.messages[client] = tensors
            found.faults.pop(client, None)
        else:
            found.faults[client] = fault
    return found


def mean_metrics(replies: Iterable[Message]) -> tuple[dict[str, float], list[str]]:
    """Return the means of what clients have found, each with the weight of its number of examples.

    Args:
        replies: To requests to evaluate, in any order.

    Returns:
        The means by name, over the clients that sent a finite number for it; and what was wrong with other replies.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    faults = []
    rows = []
    for message in replies:
        if not message.has_content():
            faults.append(_error(message))
            continue
        found = _metrics(message.content, METRICS)
        client, count = _number(message.content), found.get("num-examples")
        if client is None or not _is_number(count) or count <= 0:
            faults.append(f"client {client} does not say who it is or how many examples it has")
            continue
        rows.append((client, float(count), {name: found[name] for name in found if name != "num-examples"}))
    for client, count, found in sorted(rows, key=lambda row: row[0]):  # sums of floats depend on the order
        for name, value in sorted(found.items()):
            if _is_number(value):
                sums[name] = sums.get(name, 0.0) + count * value
                weights[name] = weights.get(name, 0.0) + count
            else:
                faults.append(f"{name} of client {client} is no finite number")
    return {name: total / weights[name] for name, total in sums.items()}, faults


def _tensors(message: Message, said: int | None, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor] | None, str]:
    """Return what a reply holds for the channel, or None and the reason."""
    if not message.has_content():
        return None, _error(message)
    if said is None:
        return None, "the reply does not say whose it is"
    if MESSAGE not in message.content.array_records:
        return None, "the reply holds no arrays"
    try:
        return from_record(message.content.array_records[MESSAGE], like), ""
    except InvalidArgument as error:
        return None, str(error)


def _sender(message: Message, nodes: Mapping[str, int]) -> int:
    """Return the node that a reply is from; errors that Flower itself makes name the message only."""
    return nodes.get(message.metadata.reply_to_message_id, message.metadata.src_node_id)


def _error(message: Message) -> str:
    """Return what a reply without content says, on one line of a bounded length."""
    reason = (message.error.reason or "") if message.has_error() else "an empty reply"
    return f"error: {' '.join(reason.split())[:200]}"


def _metrics(content: RecordDict, name: str) -> dict[str, Any]:
    return dict(content.metric_records[name]) if name in content.metric_records else {}


def _number(content: RecordDict) -> int | None:
    number = _metrics(content, CLIENT).get("number")
    return number if isinstance(number, int) and number >= 0 else None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
