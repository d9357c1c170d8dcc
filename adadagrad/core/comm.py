"""Who shares a step: `Ranks`, with sums over them that do nothing in one process, so that formulas are written once.

Which processes a number is summed over is never guessed from torch's global state: whoever sums is handed the ranks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

SMALL = 1 << 20
"""Bytes up to which a message is called small."""

_LATEST: dict[bool, deque[Any]] = {True: deque(maxlen=4), False: deque(maxlen=1)}
"""The latest messages of this process, small ones and others, kept so that it is not a thread of gloo which lets go of
one last: where that happens while the interpreter ends, the process aborts (torch 2.13). `free` empties a large one."""


@dataclass(slots=True)
class _Traffic:
    bytes: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes that share a step, seen from one of them.

    Every method that takes values is a collective: all ranks must call it, with as many values, in the same order.

    Args:
        index: This process's number among them, from 0.
        count: W, how many there are.
        device: Where messages are built: the CPU for gloo, the model's own device for nccl.
        group: Their process group; None is torch's default group.

    Example:
        >>> Ranks().sum(1.5, 2.0)
        (1.5, 2.0)
    """

    index: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    _traffic: _Traffic = field(default_factory=_Traffic, init=False, repr=False, compare=False)

    @property
    def bytes_sent(self) -> int:
        """What this rank has handed over for messages so far, but for those of `gather`, in bytes."""
        return self._traffic.bytes

    def sum(self, *values: float) -> tuple[float, ...]:
        """Add plain numbers over the ranks, in one message of 8 bytes each.

        Args:
            *values: This rank's addends.

        Returns:
            The sums, in the order given, the same on all ranks.
        """
        if self.count == 1 or not values:
            return values
        message = torch.tensor(values, dtype=torch.float64, device=self.device)
        self._wait(message, dist.all_reduce(message, op=dist.ReduceOp.SUM, group=self.group, async_op=True))
        return tuple(message.tolist())

    def add_(self, tensor: Tensor) -> Tensor:
        """Add a tensor over the ranks, in place.

        Args:
            tensor: Any shape, the same on every rank, on a device that the group can send from.

        Returns:
            The same tensor, holding the sum.
        """
        if self.count > 1:
            self._wait(tensor, dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group, async_op=True))
        return tensor

    def share_(self, tensor: Tensor) -> Tensor:
        """Give every rank the first one's tensor, in place.

        Args:
            tensor: Any shape, the same on every rank.

        Returns:
            The same tensor, holding rank 0's values.
        """
        if self.count > 1:
            whole = tensor.contiguous()  # a message is memory from its first byte on, whatever the strides are
            self._wait(whole, dist.broadcast(whole, group=self.group, group_src=0, async_op=True))
            if whole is not tensor and not torch.equal(whole, tensor):  # an expanded one cannot be written to
                tensor.copy_(whole)
        return tensor

    def first(self, *values: float) -> tuple[float, ...]:
        """Return what the first rank says.

        Args:
            *values: This rank's numbers, which count on rank 0 only.

        Returns:
            Rank 0's.
        """
        if self.count == 1:
            return values
        message = torch.tensor(values, dtype=torch.float64, device=self.device)
        self._wait(message, dist.broadcast(message, group=self.group, group_src=0, async_op=True))
        return tuple(message.tolist())

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value; for rare occasions, such as a checkpoint.

        Args:
            value: Anything that pickles.

        Returns:
            One value a rank, in order, on all ranks.
        """
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.group)
        return found

    def _wait(self, message: Tensor, work: Any) -> None:
        self._traffic.bytes += wait(message, work)


def wait(message: Tensor, work: Any) -> int:
    """Wait for a message, and keep it for as long as it is among the latest.

    Args:
        message: What is sent.
        work: What torch.distributed has returned for it, under ``async_op=True``.

    Returns:
        Its bytes.
    """
    work.wait()
    size = message.numel() * message.element_size()
    _LATEST[size <= SMALL].append(work)
    return size


def free(tensor: Tensor) -> None:
    """Give back the memory of a tensor that was sent and is not needed any more, whoever still refers to it.

    Args:
        tensor: It is empty afterwards; nothing may be a view of it.
    """
    tensor.untyped_storage().resize_(0)


ALONE = Ranks()
"""A single process."""


def all_ranks(device: torch.device | None = None, group: dist.ProcessGroup | None = None) -> Ranks:
    """Return the ranks of a process group, a single one where none has been made.

    Args:
        device: The model's device, where nccl's messages must lie; not used under gloo.
        group: The group; None is torch's default one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    on_device = device is not None and dist.get_backend(group) == "nccl"
    return Ranks(
        index=dist.get_rank(group),
        count=dist.get_world_size(group),
        device=device if on_device and device is not None else torch.device("cpu"),
        group=group,
    )
