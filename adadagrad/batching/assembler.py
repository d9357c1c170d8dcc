"""Exactly the planned examples, cut and joined from whatever chunks the workers fetched.

The batch size lives here and nowhere else: workers fetch fixed chunks, and a new size takes effect with the
next call of `take`, whole and at once, however many chunks are already on their way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from adadagrad.batching.cursor import Cursor
from adadagrad.batching.leaves import join_batches
from adadagrad.batching.source import AbstractSource, Chunk
from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument


@final
class Assembler:
    """Delivers batches of any size, one after the other, from a stream of examples.

    Every example of an epoch of the stream is delivered once, in an order that depends on the seed alone. Where ranks
    share the stream, this rank's part of it; `seek` then says where all of them stand once a step is over. A batch
    may span two epochs. A batch that lies inside one chunk is a view of it; one that spans chunks is a copy.

    What breaks it: batches whose trailing shapes change from chunk to chunk (padding to the longest example)
    cannot be joined; `BatchShapeError` then names the leaf.

    Args:
        source: Where chunks come from.
        position: Where in the stream to begin, in examples.

    Example:
        >>> import torch
        >>> from adadagrad.batching.intake import make_source
        >>> data = torch.utils.data.TensorDataset(torch.arange(5))
        >>> loader = torch.utils.data.DataLoader(data, shuffle=False)
        >>> assembler = Assembler(make_source(loader, seed=0, chunk_size=2))
        >>> [x.tolist() for (x,) in assembler.take([3, 3])], assembler.position
        ([[0, 1, 2], [3, 4, 0]], 6)
    """

    def __init__(self, source: AbstractSource, position: int = 0) -> None:
        self.source = source
        self._cursor = Cursor(source.order, position)
        self._chunk: Chunk | None = None

    def take(self, sizes: Sequence[int]) -> Iterator[Any]:
        """Deliver the next micro-batches, each made only when it is asked for.

        Args:
            sizes: Examples in each micro-batch. 0 stands for one that a rank runs for the others' sake, when it has no
                example of its own left: it holds the next example, which comes again when its turn is there.

        Returns:
            An iterator over as many batches. The position advances as each one is handed over, so that leaving
            early loses none of those that were not.

        Raises:
            InvalidArgument: No sizes, or one that is not an integer >= 0; raised at once, not at the first batch.
        """
        if not sizes:
            raise InvalidArgument("sizes must name at least one micro-batch, got none")
        for size in sizes:
            check_integer(0, sizes=size)
        return self._deliver(sizes)

    @property
    def position(self) -> int:
        """Examples delivered since the start of the stream."""
        return self._cursor.position

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next example belongs to, from 0."""
        return self._cursor.epoch

    @property
    def until_epoch_end(self) -> int:
        """Examples left in this epoch, from 1 to the size of the data set."""
        return self._cursor.until_epoch_end

    def seek(self, position: int) -> None:
        """Continue from another position, in examples from the start of the stream; >= 0."""
        self._cursor.seek(position)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: the position, and the stream that it is a position in."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was saved; an `InvalidArgument` says if that was in another stream."""
        self._cursor.load_state_dict(state)

    def _deliver(self, sizes: Sequence[int]) -> Iterator[Any]:
        for size in sizes:
            batch = self._read(self._cursor.own, max(size, 1), keep=size == 0)
            self._cursor.own += size
            yield batch

    def _read(self, start: int, count: int, *, keep: bool) -> Any:
        stop = start + count
        parts = []
        while start < stop:
            chunk = self._chunk
            if chunk is None or not chunk.start <= start < chunk.stop:
                chunk = self._chunk = self.source.chunk(start, stop - start)
            end = min(stop, chunk.stop)
            parts.append(chunk.part(start, end))
            if end == chunk.stop and not keep:
                self._chunk = None  # nothing of it is needed any more: let its memory go
            start = end
        return parts[0] if len(parts) == 1 else join_batches(parts)
