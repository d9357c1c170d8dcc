"""How a batch size becomes data: order, chunks, exact batches."""

from adadagrad.batching.assembler import Assembler
from adadagrad.batching.cursor import Cursor, SampleOrder
from adadagrad.batching.intake import make_source
from adadagrad.batching.loader import LoaderSource
from adadagrad.batching.plan import make_plan, split_batch, split_units
from adadagrad.batching.seeding import SeededDataset
from adadagrad.batching.source import AbstractSource, Chunk, MemorySource
from adadagrad.batching.weights import leading_size

__all__ = [
    "AbstractSource",
    "Assembler",
    "Chunk",
    "Cursor",
    "LoaderSource",
    "MemorySource",
    "SampleOrder",
    "SeededDataset",
    "leading_size",
    "make_plan",
    "make_source",
    "split_batch",
    "split_units",
]
