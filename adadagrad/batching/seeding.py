"""Random augmentation that depends on (seed, epoch, index) alone: not on workers, chunks, batches or restarts.

Before each example is fetched, torch's CPU generator, Python's `random` and (where it is loaded) NumPy's
global generator are seeded from the example's place in the stream. After a chunk they get their old states
back, so that in the training process dropout and initialisation draw as if no data had been loaded.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Dataset

from adadagrad.core.mixing import seed_for


class SeededDataset(Dataset[Any]):
    """A data set of collated chunks: indexed by the (epoch, index) pairs of a chunk's examples.

    The user's data set is asked for one example at a time, also where it offers ``__getitems__``: a call for
    many examples draws from one random stream, so that an example's augmentation would depend on its
    neighbours. Collating happens in here, because collate functions may be random too (token masking, mixup):
    they go on with the stream of the chunk's last example, so what they draw depends on `micro_batch_size`.

    Not covered: generators that the data set owns itself (``numpy.random.default_rng()``,
    ``torch.Generator()``), and accelerator generators. A ``worker_init_fn`` that seeds has no effect on what
    is drawn per example. In a worker, ``get_worker_info().dataset`` is this object, the user's is its `dataset`.

    Cost: about 10 microseconds an example and 100 a chunk, most of both for NumPy. Pickles if the parts do.

    Args:
        dataset: The user's map-style data set.
        seed: The run's seed.
        collate_fn: Makes one batch of a list of examples.
    """

    def __init__(self, dataset: Any, seed: int, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self.seed = seed
        self.collate_fn = collate_fn

    def __getitem__(self, keys: Sequence[tuple[int, int]]) -> Any:
        """Fetch and collate one chunk.

        Args:
            keys: The (epoch, index) pairs of the chunk's examples, at least one.

        Returns:
            What `collate_fn` makes of the examples.
        """
        with preserved_generators():
            examples = []
            for epoch, index in keys:
                _seed_generators(seed_for(self.seed, epoch, index))
                examples.append(self.dataset[index])
            return self.collate_fn(examples)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Give the process's CPU generators (torch, `random`, NumPy if loaded) their states back on leaving.

    Yields:
        Nothing.
    """
    numpy = sys.modules.get("numpy")
    torch_state, python_state = torch.default_generator.get_state(), random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def _seed_generators(seed: int) -> None:
    # Not torch.manual_seed: that one also seeds every accelerator, which belongs to the training.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed & 0xFFFFFFFF)
