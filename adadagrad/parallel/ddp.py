"""`DataParallel`: every rank holds the whole model, and DistributedDataParallel averages the gradients of a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, final

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.comm import Ranks, all_ranks
from adadagrad.parallel.base import AbstractParallel


@final
class DataParallel(AbstractParallel):
    """Run a step on all ranks of a model that is wrapped in `DistributedDataParallel`.

    Gradients are added up on each rank without communication, and averaged once, while the backward of the step's last
    micro-batch runs. A rank may run fewer micro-batches than another.

    With more than two ranks a resumed run is the same to rounding: the wrapper arranges its buckets anew after the
    first step of a process, and with them the order of sums. ``find_unused_parameters=True`` keeps every bit.

    Evaluate ``model.module``, not the wrapper: the wrapper's forward sends buffers to all ranks, and waits for them.

    Args:
        model: The wrapped model, the same on every rank of its process group.
    """

    gradient: ClassVar[Literal["shared", "sharded", "local"]] = "shared"
    aligned: ClassVar[bool] = False

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model
        device = next((p.device for p in model.parameters()), None)
        self._ranks = all_ranks(device, model.process_group)

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        module: nn.Module = self._model.module
        return module

    @property
    def ranks(self) -> Ranks:
        """The ranks of the wrapper's process group."""
        return self._ranks

    def micro_batch(self, *, last: bool, measured: bool) -> AbstractContextManager[None]:
        """Return a context that synchronises gradients in the last micro-batch only."""
        synchronised: AbstractContextManager[None] = nullcontext() if last else self._model.no_sync()
        return synchronised
