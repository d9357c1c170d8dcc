"""Sums over ranks that are a no-op in one process, so that formulas are written once.

Every function is a collective: all ranks must call it with the same shapes, in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add a tensor over all ranks, in place.

    Args:
        tensor: Any shape, the same on every rank; changed in place where there is more than one rank.

    Returns:
        The same tensor, holding the sum.
    """
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def sum_scalars(*values: float, device: torch.device | None = None) -> tuple[float, ...]:
    """Add plain numbers over all ranks in one message of 8 bytes each.

    Args:
        *values: This rank's addends.
        device: Where the message is built; the group's own device for nccl, the CPU otherwise.

    Returns:
        The sums, in the order given; the values unchanged in one process.
    """
    if world_size() == 1:
        return values
    message = torch.tensor(values, dtype=torch.float64, device=device)
    return tuple(all_reduce_sum(message).tolist())
