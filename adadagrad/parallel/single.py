"""`SingleProcess`: the step runs here and nowhere else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, final

from torch import nn

from adadagrad.core.comm import ALONE, Ranks
from adadagrad.parallel.base import AbstractParallel


@final
class SingleProcess(AbstractParallel):
    """Run every step in this process alone, whatever process group there is.

    Args:
        model: The model.
    """

    gradient: ClassVar[Literal["shared", "sharded", "local"]] = "shared"
    aligned: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self._model

    @property
    def ranks(self) -> Ranks:
        """This process."""
        return ALONE

    def micro_batch(self, *, last: bool, measured: bool) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return _NOTHING


_NOTHING = nullcontext()
