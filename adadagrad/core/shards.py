"""What a `DTensor` holds on this rank, and sums over the ranks that hold the rest: for norms of sharded gradients.

`fully_shard` makes every parameter and its gradient a DTensor. Its local part shares storage with it, so that whatever
works coordinate by coordinate (scaling, an optimizer's update) is done on local parts, without a message. A norm is the
sum over local parts, and then over ranks: one message of 8 bytes for each mesh, however many tensors there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adadagrad.core.comm import wait
from adadagrad.core.errors import InvalidArgument

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_PLAIN = (Tensor, nn.Parameter)


@dataclass(frozen=True, slots=True)
class Place:
    """How tensors lie on ranks: those that lie alike are added up in one message.

    Args:
        mesh: The ranks; None for plain tensors, of which every rank has a whole copy.
        dims: The mesh's dimensions along which the tensors are cut; copies lie along the others.
    """

    mesh: DeviceMesh | None = None
    dims: tuple[int, ...] = ()

    def add_(self, value: Tensor) -> Tensor:
        """Add a number over the ranks that hold different parts; a collective where there are any.

        Args:
            value: This rank's scalar, on any device.

        Returns:
            The sum, a scalar on the same device.
        """
        if self.mesh is None or not self.dims:
            return value
        message = value.to(self.mesh.device_type)
        for dim in self.dims:
            wait(message, dist.all_reduce(message, group=self.mesh.get_group(dim), async_op=True))
        return message.to(value.device)


EVERYWHERE = Place()
"""A whole copy on every rank."""


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, which may hold only a part of its elements here."""
    if type(tensor) in _PLAIN or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor.

    Args:
        tensor: Any tensor.

    Returns:
        A plain tensor in the same storage, possibly without any element; the tensor itself where it is plain.

    Raises:
        InvalidArgument: As for `place_of`.
    """
    if not is_sharded(tensor):
        return tensor
    place_of(tensor)
    with torch.no_grad():
        return cast("DTensor", tensor).to_local()


def spread(value: Any, like: Tensor | None) -> Any:
    """Lay a whole tensor, which every rank has, on the ranks as another one lies; and gather one that lies otherwise.

    Args:
        value: A tensor, or anything else, which is returned as it is.
        like: A tensor of the same shape; None leaves a plain value plain.

    Returns:
        A DTensor where `like` is one of the same shape; else a plain tensor.
    """
    if not isinstance(value, Tensor):
        return value
    placed = like is not None and is_sharded(like) and like.shape == value.shape
    if is_sharded(value):
        return value if placed else cast("DTensor", value).full_tensor()
    if not placed:
        return value
    from torch.distributed.tensor import distribute_tensor

    other = cast("DTensor", like)
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


def place_of(tensor: Tensor) -> Place:
    """Return how a tensor lies on ranks.

    Args:
        tensor: Any tensor.

    Returns:
        Its place.

    Raises:
        InvalidArgument: Ranks hold addends of it, which no coordinate can be read off.
    """
    if not is_sharded(tensor):
        return EVERYWHERE
    placed = cast("DTensor", tensor)
    if any(placement.is_partial() for placement in placed.placements):
        raise InvalidArgument(
            f"a tensor with placements {placed.placements} holds addends, whose norm is not that of their sum: "
            "redistribute it to Shard or Replicate first"
        )
    dims = tuple(dim for dim, placement in enumerate(placed.placements) if not placement.is_replicate())
    return Place(placed.device_mesh, dims)


def by_place(tensors: Iterable[Tensor]) -> dict[Place, list[Tensor]]:
    """Return the local parts of tensors, those together that lie alike, in the order in which places come up.

    Args:
        tensors: Plain ones and DTensors, the same on every rank.

    Returns:
        Place -> local parts.
    """
    found: dict[Place, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(place_of(tensor), []).append(local_part(tensor))
    return found


def all_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether no tensor is a DTensor, at little cost."""
    return not any(is_sharded(tensor) for tensor in tensors)
