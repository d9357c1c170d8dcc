"""`FullyShard`: every rank holds a shard of the model; FSDP2 gathers it layer by layer and scatters the gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, final

from torch import nn

from adadagrad.core.comm import Ranks, all_ranks
from adadagrad.parallel.base import AbstractParallel


@final
class FullyShard(AbstractParallel):
    """Run a step on all ranks of a model that `torch.distributed.fsdp.fully_shard` has sharded.

    Args:
        model: The sharded model.
    """

    gradient: ClassVar[Literal["shared", "sharded", "local"]] = "sharded"
    aligned: ClassVar[bool] = True

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        device = next((p.device for p in model.parameters()), None)
        self._ranks = all_ranks(device)

    @property
    def module(self) -> nn.Module:
        """The model itself, which FSDP2 does not wrap."""
        return self._model

    @property
    def ranks(self) -> Ranks:
        """All ranks."""
        return self._ranks

    def micro_batch(self, *, last: bool, measured: bool) -> AbstractContextManager[None]:
        """Return a context that reduces the gradient of every micro-batch."""
        return nullcontext()
