"""How a step runs on many devices: torch.distributed, started by ``torchrun``, behind one small protocol."""

from __future__ import annotations

from adadagrad.parallel.base import AbstractParallel
from adadagrad.parallel.ddp import DataParallel
from adadagrad.parallel.recognising import recognise
from adadagrad.parallel.single import SingleProcess
from adadagrad.parallel.starting import data_parallel, join_process_group, leave_process_group

__all__ = [
    "AbstractParallel",
    "DataParallel",
    "SingleProcess",
    "data_parallel",
    "join_process_group",
    "leave_process_group",
    "recognise",
]
