"""The order of the data as a pure function of (seed, position), and the one number that says where we are.

The order is an endless stream of permutations of the data set, one an epoch. Position p, counted in examples,
is example ``permutation(p // N)[p % N]``. No batch size enters, so a run can change its batch size at any
step, and resume anywhere with any other one, without skipping or repeating an example.

Several ranks share the stream: rank r of W delivers the positions p with p % W = r. So a step over the positions
P .. P+b-1 holds the same examples whatever W is, the ranks' parts differ by one example at most, and each rank reads a
stream of its own from end to end, which its data workers can fetch ahead without knowing a batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.mixing import seed_for


class SampleOrder:
    """Which example stands where in the stream.

    Epoch e is ``torch.randperm(size)`` from a generator of its own, seeded with ``seed_for(seed, e)``, or
    0 .. size-1 without `shuffle`. One permutation is kept: 8 bytes an example.

    Args:
        size: N, examples in the data set, >= 1.
        seed: The run's seed, an integer; its low 64 bits count.
        shuffle: Whether to permute; False keeps the data set's own order in every epoch.
        rank: r, this process's number among those that share the stream, from 0.
        ranks: W, how many there are. Positions that a method takes are counted in this rank's own examples.
        own_data: Whether each rank has a data set of its own, of which it delivers every example: `size` is then this
            rank's, and of the shared stream only the counts remain.

    Example:
        >>> SampleOrder(3, seed=0, shuffle=False).locate(2, 3)
        [(0, 2), (1, 0), (1, 1)]
        >>> SampleOrder(3, seed=0, shuffle=False, rank=1, ranks=2).locate(0, 3)
        [(0, 1), (1, 0), (1, 2)]
    """

    def __init__(
        self,
        size: int,
        seed: int,
        shuffle: bool = True,
        *,
        rank: int = 0,
        ranks: int = 1,
        own_data: bool = False,
    ) -> None:
        check_integer(1, size=size, ranks=ranks)
        check_integer(-(2**63), seed=seed)
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.rank, self.ranks = rank, ranks
        self._first, self._stride = (0, 1) if own_data else (rank, ranks)
        self.total = size
        """Examples in the data sets of all ranks, which whoever knows them says; where they share one, its size."""
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

    def before(self, position: int, rank: int | None = None) -> int:
        """Return how many of the examples before a position of the shared stream are a rank's.

        Args:
            position: Examples from the start of the shared stream.
            rank: Whose; None for this one's.

        Returns:
            The number, which is the place of the rank's next example in its own stream.
        """
        rank = self.rank if rank is None else rank
        return (position - rank + self.ranks - 1) // self.ranks

    def indices(self, start: int, count: int) -> Tensor:
        """Return the indices of the examples at positions start .. start+count-1, over epochs if need be.

        Args:
            start: First position, >= 0.
            count: Number of examples, >= 1.

        Returns:
            Shape (count,), int64.
        """
        epoch, offset = divmod(start * self._stride + self._first, self.size)
        if offset + (count - 1) * self._stride < self.size:
            return self.permutation(epoch)[offset : offset + (count - 1) * self._stride + 1 : self._stride]
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
            epoch, offset = divmod(start * self._stride + self._first, self.size)
            length = min(-(-(self.size - offset) // self._stride), stop - start)
            yield epoch, self.permutation(epoch)[offset : offset + (length - 1) * self._stride + 1 : self._stride]
            start += length


class Cursor:
    """Where a run stands in the stream: how many examples have been delivered, and nothing else.

    Args:
        order: The stream.
        position: Examples delivered so far by all ranks, >= 0.
    """

    def __init__(self, order: SampleOrder, position: int = 0) -> None:
        self.order = order
        self.seek(position)

    @property
    def position(self) -> int:
        """Examples delivered by all ranks; where there are several, as of the last `seek`."""
        return self.own if self.order.ranks == 1 else self._sought

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next example belongs to, from 0."""
        return self.position // self.order.size

    @property
    def until_epoch_end(self) -> int:
        """Examples left in this epoch, from 1 to N."""
        return self.order.size - self.position % self.order.size

    def seek(self, position: int) -> None:
        """Go to a position, in examples from the start of the shared stream; >= 0."""
        check_integer(0, position=position)
        self._sought = position
        self.own = self.order.before(position)
        """Examples that this rank has delivered."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it is a position in, as plain numbers."""
        order = self.order
        return {
            "position": self.position,
            "seed": order.seed,
            "dataset_size": order.total,
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
