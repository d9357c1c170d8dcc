r"""Norms and inner products over lists of tensors: the only place where they are computed.

The variance trace is a difference of large numbers, so `squared_norm` and `inner_product` accumulate in
float64. A float32 accumulation over 2.4 million elements is off by about 1e-4, which is the size of the
noise itself in a large batch. On a CPU `squared_norm` adds at most 128 squares of a large float32 tensor in float32
before it does (error about 1e-10 over 2.4 million elements): half the time of converting every element.

DTensors count with all their elements, wherever these are: every function here is then a collective of one message of 8
bytes for each mesh (`shards.py`). Plain tensors beside them are taken for copies that all ranks have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.shards import Place, all_plain, by_place, local_part, place_of

HALVES = (torch.float16, torch.bfloat16)
"""Kinds of numbers that are too coarse for sums, and for factors near 1."""

PIECE = 1 << 19
"""Elements that are converted to float64 at a time: 4 MB, so that a large tensor needs no copy of twice its size."""

ROW = 128
"""Elements whose squares are added in float32 where a tensor has more than `SHORT`: such sums are off by 1e-7 each, at
random, and so by about 1e-9 together."""

SHORT = 1 << 14
"""Elements up to which a tensor is converted to float64 as a whole."""

VANISHING = 1e-20
"""Squared norm below which squares may have vanished in float32, and are formed in float64."""

FEW = 32
"""Tensors up to which `quick_norm` adds their norms in plain floats."""


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    r"""Return \|x\|^2 of all tensors taken as one vector.

    Args:
        tensors: Dense real tensors on one device, DTensors among them or not; none gives 0.

    Returns:
        float64 scalar tensor on their device (CPU for no tensors); right to 1e-9 for float32 tensors, else to 1e-12.

    Raises:
        InvalidArgument: A tensor is sparse, or a DTensor of which ranks hold addends.

    Example:
        >>> squared_norm([torch.ones(3), torch.full((2, 2), 2.0)]).item()
        19.0
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        if all_plain(tensors):
            return _squared_norm(tensors)
        return torch.stack([place.add_(_squared_norm(parts)) for place, parts in by_place(tensors).items()]).sum()


def _squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    squares = [_square(refuse_sparse(t)) for t in tensors]
    return torch.stack(squares).sum() if len(squares) > 1 else squares[0]


def _square(tensor: Tensor) -> Tensor:
    r"""Return \|x\|^2 as a float64 scalar."""
    if tensor.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
        return norm.square()
    flat = tensor.reshape(-1)
    if tensor.dtype == torch.float32 and flat.numel() > SHORT:
        square = _square_by_rows(flat)
        if VANISHING < float(square) < math.inf:
            return square
    if flat.numel() <= PIECE or tensor.dtype == torch.float64:
        wide = flat.double()
        return torch.dot(wide, wide)
    pieces = (piece.double() for piece in torch.split(flat, PIECE))
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).sum()


def _square_by_rows(flat: Tensor) -> Tensor:
    r"""Return \|x\|^2 as a float64 scalar; squares are added in float32 within rows, in float64 over them."""
    whole = flat.numel() - flat.numel() % ROW
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1).double()
    rest = flat[whole:].double()
    return torch.dot(norms, norms) + torch.dot(rest, rest)


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors, each taken as one vector.

    Args:
        left: Dense real tensors on one device, DTensors among them or not.
        right: Tensors of the same shapes; beside a DTensor, one that is cut in the same way.

    Returns:
        float64 scalar tensor on their device (CPU for no tensors).

    Raises:
        InvalidArgument: A DTensor stands beside a tensor that lies on ranks in another way.
    """
    if not left:
        return torch.zeros((), dtype=torch.float64)
    sums: dict[Place, list[Tensor]] = {}
    for a, b in zip(left, right, strict=True):
        place = place_of(a)
        if place_of(b) != place:
            raise InvalidArgument("left and right must lie on ranks in the same way: redistribute one of them first")
        one, other = (local_part(t).detach().double().flatten() for t in (a, b))
        sums.setdefault(place, []).append(torch.linalg.vecdot(one, other))
    return torch.stack([place.add_(torch.stack(products).sum()) for place, products in sums.items()]).sum()


def tensor_norms(tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
    r"""Return \|x\| of each tensor by itself, in its own precision and at least in float32.

    Args:
        tensors: Dense real tensors, DTensors among them or not; at least one.
        like: For tensors that are this rank's parts of larger ones: DTensors that lie on the ranks as those do.

    Returns:
        (n,) norms on the device of the first. A collective of 8 n bytes for each mesh where there are DTensors.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.ones(4)]).tolist()
        [5.0, 2.0]
    """
    parts = [local_part(t).detach() for t in tensors]
    dtypes = [torch.promote_types(part.dtype, torch.float32) for part in parts]
    found = [torch.linalg.vector_norm(p, dtype=d) for p, d in zip(parts, dtypes, strict=True)]
    norms = torch.stack([norm.to(found[0].device) for norm in found])
    placed = tensors if like is None else like
    if all_plain(placed):
        return norms
    squares = norms.double().square()
    places: dict[Place, list[int]] = {}
    for index, tensor in enumerate(placed):
        places.setdefault(place_of(tensor), []).append(index)
    for place, indices in places.items():
        squares[indices] = place.add_(squares[indices])
    return squares.sqrt().to(norms.dtype)


def quick_norm(tensors: Sequence[Tensor]) -> float:
    r"""Return \|x\| in the tensors' own precision, for clipping and for finding NaN; not for statistics.

    Called at every step, so a few norms on the CPU are read off and added as plain floats, which takes half the
    time of two more tensor operations.

    Args:
        tensors: Dense real tensors on one device, DTensors among them or not; none gives 0.

    Returns:
        The norm; NaN or infinite if any element is, infinite too where it exceeds what that precision holds. Waits for
        the device.
    """
    if not tensors:
        return 0.0
    if not all_plain(tensors):
        norms = [_norm_over_ranks(place, parts) for place, parts in by_place(tensors).items()]
        return math.hypot(*norms)
    return _quick_norm(tensors)


def _norm_over_ranks(place: Place, parts: Sequence[Tensor]) -> float:
    own = _quick_norm(parts)
    square = torch.tensor(own * own, dtype=torch.float64, device=parts[0].device)
    return math.sqrt(float(place.add_(square)))


def _quick_norm(tensors: Sequence[Tensor]) -> float:
    if len(tensors) <= FEW and tensors[0].device.type == "cpu":
        return math.hypot(*(torch.linalg.vector_norm(refuse_sparse(t)).item() for t in tensors))
    found = torch._foreach_norm([refuse_sparse(t) for t in tensors])
    return float(torch.linalg.vector_norm(torch.stack(list(found))))


def refuse_sparse(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or refuse it if it is sparse.

    Args:
        tensor: Any tensor.

    Returns:
        The same tensor.

    Raises:
        InvalidArgument: The tensor is sparse.
    """
    if tensor.layout != torch.strided:
        raise InvalidArgument("sparse gradients are not supported: build the Embedding with sparse=False")
    return tensor
