"""Parameters displaced in place and put back bit for bit, and reproducible noise to displace them by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.shards import is_sharded, local_part
from adadagrad.core.vectors import tensor_norms

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

TIMES = 2
"""In how much larger pieces parameters are displaced and moved than in other optimizers, which need temporaries."""

FilterNorm = Literal["rms", "norm", "match"]
FILTER_NORMS = ("rms", "norm", "match")


class Kept:
    """Copies of tensors that are about to be changed in place."""

    def __init__(self) -> None:
        self._rows: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = []

    @torch.no_grad()
    def keep(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Copy some tensors.

        Args:
            tensors: Plain ones.

        Returns:
            The copies.
        """
        copies = [torch.empty_like(tensor) for tensor in tensors]
        torch._foreach_copy_(copies, list(tensors))
        self._rows.append((tensors, copies))
        return copies

    @torch.no_grad()
    def restore(self) -> None:
        """Copy everything back, the last first, so that tensors may overlap."""
        while self._rows:
            tensors, copies = self._rows.pop()
            torch._foreach_copy_(list(tensors), list(copies))


def gaussian(like: Tensor, seed: int) -> Tensor:
    """Return N(0, 1) noise that depends on the seed alone, and on the kind of device.

    Args:
        like: A plain tensor.
        seed: From 0 to 2**64 - 1.

    Returns:
        Noise of its shape, dtype and device, at least in float32.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, generator=generator, dtype=dtype, device=like.device)


def scale_by_filters_(noise: Tensor, param: Tensor, norm: FilterNorm) -> Tensor:
    r"""Multiply noise by the size of the filters that it is for, in place.

    A filter is a slice along the first dimension: an output channel, or a row of a linear layer. A tensor of one
    dimension or none is one filter. With f a filter of n entries, and xi its noise, the factor is

    .. math:: \|f\| / \sqrt n \ (rms), \qquad \|f\| \ (norm), \qquad \|f\| / \|\xi\| \ (match).

    Args:
        noise: xi, of this rank's part of the parameter.
        param: The parameter, not displaced. A sharded tensor of one dimension needs its other ranks' parts: there this
            is a collective of 8 bytes, and one more for ``"match"``.
        norm: Which.

    Returns:
        The noise.
    """
    part = local_part(param)
    if part.ndim >= 2:
        shape = (part.shape[0], *[1] * (part.ndim - 1))
        if not part.numel():
            return noise
        sizes = torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=noise.dtype).view(shape)
        own = torch.linalg.vector_norm(noise.flatten(1), dim=1).view(shape)
        entries = part.numel() // part.shape[0]
    else:
        sizes = tensor_norms([param])[0].to(noise.dtype)
        own = tensor_norms([noise], like=[param])[0] if norm == "match" else sizes
        entries = param.numel()
    if norm == "rms":
        sizes = sizes / math.sqrt(max(entries, 1))
    elif norm == "match":
        sizes = sizes / own.clamp(min=torch.finfo(noise.dtype).tiny)
    return noise.mul_(sizes)


def check_whole_filters(param: Tensor, place: str) -> None:
    """Refuse a sharded parameter of which no rank holds whole filters.

    Args:
        param: The parameter.
        place: Which one it is, for the message.

    Raises:
        InvalidArgument: It is cut along another dimension than the first.
    """
    if not is_sharded(param) or param.ndim < 2:
        return
    placements = cast("DTensor", param).placements
    if any(placement.is_shard() and getattr(placement, "dim", 0) != 0 for placement in placements):
        raise InvalidArgument(
            f"perturb='filter' needs whole filters, got placements {placements} for {place}: shard it along its first "
            "dimension, or use perturb='isotropic'"
        )
