"""The engine's steps as Trainer's training dataloader, and Trainer's data as the engine's."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

from torch.utils.data import DataLoader

from adadagrad.engine.adaptive_batch import AdaptiveBatch
from adadagrad.engine.step import Step


class Row:
    """One example of the data set, not yet collated, which travels through the engine's chunks as it is.

    Args:
        example: What the data set returned.
    """

    __slots__ = ("example",)

    def __init__(self, example: Any) -> None:
        self.example = example


class StepLoader:
    """What Trainer iterates in training: each item holds one `Step`, and none is drawn before the last is complete.

    Examples are fetched by the loader's workers and collated micro-batch by micro-batch here, so that a collator which
    pads to the longest example sees exactly the micro-batch that is run.

    Args:
        host: Trainer's own loader, whose data set (without unused columns), collation and workers are used.
        shuffle: Whether the order is random.
        micro_batch_size: Most examples in one forward.
    """

    def __init__(self, host: DataLoader[Any], *, shuffle: bool, micro_batch_size: int) -> None:
        self.dataset = host.dataset
        self._collate = cast(Callable[[list[Any]], Any], host.collate_fn)
        workers: dict[str, Any] = {"num_workers": host.num_workers, "timeout": host.timeout}
        if host.num_workers:
            workers |= {
                "worker_init_fn": host.worker_init_fn,
                "prefetch_factor": host.prefetch_factor,
                "multiprocessing_context": host.multiprocessing_context,
            }
        self.data: DataLoader[Any] = DataLoader(
            host.dataset, batch_size=micro_batch_size, shuffle=shuffle, collate_fn=as_rows, **workers
        )
        """What the engine is given."""
        self._engine: AdaptiveBatch | None = None
        self._steps: Generator[Step, None, None] | None = None

    def __len__(self) -> int:
        """Return the most steps that an epoch can have, one for each example."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Step]]:
        """Go on with the run's steps; Trainer calls it anew in every epoch.

        Yields:
            The next step, under the name "step".
        """
        if self._steps is not None:
            for step in self._steps:
                yield {"step": step}

    def start(self, engine: AdaptiveBatch) -> None:
        """Let the steps come from an engine.

        Args:
            engine: The engine on `data`.
        """
        self._engine = engine
        self._steps = cast("Generator[Step, None, None]", iter(engine))

    def finish(self) -> None:
        """End the engine's loop: as one that has used its budget, or as one that was left."""
        if self._engine is None or self._steps is None:
            return
        if self._engine.progress >= self._engine.total_samples:
            next(self._steps, None)
        self._steps.close()

    def collate(self, rows: list[Row]) -> Any:
        """Make a micro-batch of examples with Trainer's own collation.

        Args:
            rows: The examples.

        Returns:
            What the collator makes of them.
        """
        return self._collate([row.example for row in rows])


def as_rows(examples: list[Any]) -> list[Row]:
    """Wrap examples, so that a chunk of them can be cut anywhere.

    Args:
        examples: What the data set returned.

    Returns:
        As many rows.
    """
    return [Row(example) for example in examples]
