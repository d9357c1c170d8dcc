"""Data sets and collate functions that the tests of batching share; all of them pickle."""

from __future__ import annotations

import dataclasses
import os
import random
from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from adadagrad.batching import Assembler, make_source

WORKERS = [0, 2, 4]

# The machine that runs the tests may have fewer cores than workers, and fork is what most of them start by.
many_workers = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


class Numbers(Dataset):
    """Example i is the number i, and who fetched it."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index, os.getpid()


class Augmented(Numbers):
    """Example i with a random draw from each of the three global generators."""

    def __getitem__(self, index):
        import numpy

        return index, torch.rand(()), random.random(), numpy.random.rand()

    def __getitems__(self, indices):
        raise AssertionError("asked for many examples at once: their augmentation would share one random stream")


class Fragile(Numbers):
    """Raises once at one index, as a read from a network may."""

    def __init__(self, size, broken):
        super().__init__(size)
        self.broken = broken

    def __getitem__(self, index):
        if index == self.broken:
            self.broken = None
            raise OSError("lost connection")
        return index


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


class Unsized(Dataset):
    def __getitem__(self, index):
        return index


Pair = namedtuple("Pair", ["image", "label"])


@dataclasses.dataclass(frozen=True)
class Record:
    value: torch.Tensor
    name: list
    split: str = "train"


def nested(examples):
    """Collate into every kind of branch and leaf that can be cut."""
    x = torch.tensor([i for i, _ in examples])
    return {
        "pair": Pair(x, x.double() / 2),
        "tuple": (x[:, None] + torch.arange(3), [x * 10, {"deep": x * 100}]),
        "record": Record(x + 1, [f"n{i}" for i in x.tolist()]),
        "names": tuple(str(i) for i in x.tolist()),
        "none": None,
        "kind": "numbers",
    }


def padded(examples):
    """Pad to the longest of the chunk: what cannot be joined."""
    return {"tokens": torch.nn.utils.rnn.pad_sequence([torch.ones(i + 1) for i, _ in examples], batch_first=True)}


def noisy(examples):
    """Draw from the generator while collating, as token masking does."""
    return torch.tensor([i for i, *_ in examples]), torch.rand(len(examples))


def assemble(data, *, seed=0, chunk_size=8, position=0, stop=None):
    return Assembler(make_source(data, seed=seed, chunk_size=chunk_size, stop=stop), position)


def load(dataset, workers=0, **options):
    options.setdefault("shuffle", True)
    return DataLoader(dataset, num_workers=workers, **options)


def random_sizes(total, seed, largest=40):
    """Sizes that grow and shrink at random, and add up to a total."""
    draw = random.Random(seed)
    sizes = []
    while total:
        sizes.append(min(total, draw.choice([1, 2, 3, draw.randint(1, largest)])))
        total -= sizes[-1]
    return sizes
