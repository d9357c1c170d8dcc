"""A rank's own gradients, seen between a backward and the moment at which `DistributedDataParallel` averages them.

A parameter's post-accumulate hook runs when its gradient has been added to `.grad`, and before the wrapper's reducer
is told that it is ready. So it sees the local sum, needs no place among the wrapper's communication hooks (there is
only one, which may be the user's), and costs nothing where it only takes note.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Receiver = Callable[[nn.Parameter, Tensor], None]
"""Takes a parameter and the local sum in its `.grad`."""


@contextmanager
def watched(parameters: Iterable[nn.Parameter], receive: Receiver) -> Iterator[None]:
    """Hand every parameter's local gradient to a function, as soon as a backward inside has added to it.

    Args:
        parameters: Trainable leaves.
        receive: Is given the very tensor in `.grad`, which must be left alone and is soon something else.

    Yields:
        Nothing.
    """

    def hook(p: Tensor) -> None:
        if p.grad is not None and isinstance(p, nn.Parameter):
            receive(p, p.grad.detach())

    handles = [p.register_post_accumulate_grad_hook(hook) for p in parameters]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LocalGradients:
    """Which parameters received a gradient on this rank, and copies of some of them.

    Args:
        copied: The parameters whose gradients are kept.
    """

    def __init__(self, copied: Collection[nn.Parameter]) -> None:
        self._copied = set(copied)
        self.received: set[nn.Parameter] = set()
        self.kept: dict[nn.Parameter, Tensor] = {}

    def __call__(self, p: nn.Parameter, gradient: Tensor) -> None:
        """Take in one gradient."""
        self.received.add(p)
        if p in self._copied:
            with torch.no_grad():
                self.kept[p] = gradient.clone()
