"""The order of the data as a pure function of (seed, position), and the one number that says where we are.

The order is an endless stream of permutations of the data set, one an epoch. Position p, counted in examples,
is example ``permutation(p // N)[p % N]``. No batch size enters, so a run can change its batch size at any
step, and resume anywhere with any other one, without skipping or repeating an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from adadagrad.batching.mixing import seed_for
from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument


class SampleOrder:
    """Which example stands where in the stream.

    Epoch e is ``torch.randperm(size)`` from a generator of its own, seeded with ``seed_for(seed, e)``, or
    0 .. size-1 without `shuffle`. One permutation is kept: 8 bytes an example.

    Args:
        size: N, examples in the data set, >= 1.
        seed: The run's seed, an integer; its low 64 bits count.
        shuffle: Whether to permute; False keeps the data set's own order in every epoch.

    Example:
        >>> SampleOrder(3, seed=0, shuffle=False).locate(2, 3)
        [(0, 2), (1, 0), (1, 1)]
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        check_integer(1, size=size)
        check_integer(-(2**63), seed=seed)
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def permutation(self, epoch: int) -> Tensor:
        """Return the order of one epoch.

        Args:
            epoch: Number of the epoch, from 0.

        Returns:
            Shape (N,), int64, each of 0 .. N-1 once. Shared with this object: not to be changed.
        """
        if epoch != self._epoch:
            if self.shuffle:
                generator = torch.Generator().manual_seed(seed_for(self.seed, epoch))
                self._permutation = torch.randperm(self.size, generator=generator)
            elif self._epoch < 0:
                self._permutation = torch.arange(self.size)
            self._epoch = epoch
        return self._permutation

    def indices(self, start: int, count: int) -> Tensor:
        """Return the indices of the examples at positions start .. start+count-1, over epochs if need be.

        Args:
            start: First position, >= 0.
            count: Number of examples, >= 1.

        Returns:
            Shape (count,), int64.
        """
        epoch, offset = divmod(start, self.size)
        if offset + count <= self.size:
            return self.permutation(epoch)[offset : offset + count]
        return torch.cat([part for _, part in self._segments(start, count)])

    def locate(self, start: int, count: int) -> list[tuple[int, int]]:
        """Return (epoch, index) of the examples at positions start .. start+count-1.

        Args:
            start: First position, >= 0.
            count: Number of examples, >= 1.

        Returns:
            One pair an example; no two are equal in the whole stream.
        """
        return [pair for epoch, part in self._segments(start, count) for pair in zip(repeat(epoch), part.tolist())]

    def _segments(self, start: int, count: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (epoch, indices) for each epoch that the positions touch."""
        stop = start + count
        while start < stop:
            epoch, offset = divmod(start, self.size)
            length = min(self.size - offset, stop - start)
            yield epoch, self.permutation(epoch)[offset : offset + length]
            start += length


class Cursor:
    """Where a run stands in the stream: how many examples have been delivered, and nothing else.

    Args:
        order: The stream.
        position: Examples delivered so far, >= 0.
    """

    def __init__(self, order: SampleOrder, position: int = 0) -> None:
        self.order = order
        self.position = position
        self.seek(position)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next example belongs to, from 0."""
        return self.position // self.order.size

    @property
    def until_epoch_end(self) -> int:
        """Examples left in this epoch, from 1 to N."""
        return self.order.size - self.position % self.order.size

    def seek(self, position: int) -> None:
        """Go to a position, in examples from the start of the stream; >= 0."""
        check_integer(0, position=position)
        self.position = position

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it is a position in, as plain numbers."""
        order = self.order
        return {
            "position": self.position,
            "seed": order.seed,
            "dataset_size": order.size,
            "shuffle": order.shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where the state was saved, if it was saved in the same stream.

        Args:
            state: What `state_dict` returned.

        Raises:
            InvalidArgument: The state lacks an entry, or was saved for another seed, size or shuffling: then
                its position would stand for other examples.
        """
        own = self.state_dict()
        for name, value in own.items():
            if name not in state:
                raise InvalidArgument(f"state of the data order lacks {name!r}")
            if name != "position" and state[name] != value:
                raise InvalidArgument(
                    f"{name} is {value} here but {state[name]} in the saved state: the same position would mean "
                    f"other examples; resume with {name}={state[name]}"
                )
        self.seek(state["position"])
