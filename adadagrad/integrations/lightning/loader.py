"""What `Trainer.fit` iterates: micro-batches of one size, as many in every epoch and on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from adadagrad.core.errors import InvalidArgument, StepError
from adadagrad.integrations.lightning.run import Run


@final
class AdaptiveLoader:
    """The micro-batches of the callback's steps; made by `AdaptiveBatchCallback.loader`.

    It says to Lightning that its position is kept, which the callback's state does.

    Args:
        loader: The user's, of which data set, batch size, shuffling, collation and workers are used.
        run: Returns the run at work, or None.

    Raises:
        InvalidArgument: The loader is no DataLoader, or has no batch size, or its data set no length.
    """

    def __init__(self, loader: DataLoader[Any], run: Callable[[], Run | None]) -> None:
        if not isinstance(loader, DataLoader):
            raise InvalidArgument(
                f"loader must be a torch DataLoader over a data set with a length, got {type(loader).__name__}"
            )
        if isinstance(loader.dataset, IterableDataset):
            raise InvalidArgument("loader must have a data set with a length: give a map-style one, no IterableDataset")
        if loader.batch_size is None:
            raise InvalidArgument(
                "loader must have a batch_size, which becomes the micro-batch: give one instead of a batch_sampler"
            )
        self.loader, self.micro_batch_size, self._run = loader, loader.batch_size, run
        self.dataset_size = len(loader.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Return the micro-batches that a rank runs in an epoch; the rank with fewer examples runs as many."""
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return math.ceil(math.ceil(self.dataset_size / ranks) / self.micro_batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Yield the micro-batches of an epoch, or of what is left of it.

        Raises:
            StepError: No training is at work.
        """
        while True:
            run = self._run()
            if run is None:
                raise StepError("the callback's loader can be iterated in training only: use the loader it was made of")
            if run.over:
                return
            yield run.next_micro_batch()
            if run.at_epoch_end:
                return

    def state_dict(self) -> dict[str, Any]:
        """Return nothing; see the class."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing; see the class.

        Args:
            state_dict: What `state_dict` returned.
        """
