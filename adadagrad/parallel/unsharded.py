"""A rank's own gradients under `fully_shard`, seen in the backward before they are cut up and sent.

A sharded parameter is no leaf of a rank's graph: FSDP2 gathers it into an unsharded one, which the module holds while
its forward runs, and which autograd differentiates. A forward pre-hook, which runs after FSDP2's own, finds it there; a
hook on it sees the whole gradient of this rank's micro-batch. Nothing is sent or kept, no rounding of the reduction is
in it, and it does not matter whether this micro-batch is reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from adadagrad.core.shards import is_sharded

Receiver = Callable[[nn.Parameter, Tensor], None]
"""Takes one of the model's parameters and the gradient that this rank's backward has found for it, of full shape."""


class UnshardedGradients:
    """Where a model's unsharded parameters are to be found.

    Args:
        model: A module, parts of which `fully_shard` has sharded; resharded at present.
    """

    def __init__(self, model: nn.Module) -> None:
        self._homes: dict[nn.Module, list[tuple[nn.Parameter, nn.Module, str]]] = {}
        for module in model.modules():
            if isinstance(module, FSDPModule):
                self._homes[module] = [
                    (p, owner, name)
                    for owner in _own_modules(module)
                    for name, p in owner.named_parameters(recurse=False, remove_duplicate=False)
                    if is_sharded(p)
                ]
        self._plain = [p for p in model.parameters() if not is_sharded(p)]

    @contextmanager
    def watched(self, receive: Receiver) -> Iterator[None]:
        """Hand every parameter's gradient of the backward inside to a function; forward and backward belong inside.

        Args:
            receive: Called once for each parameter and backward, as soon as the whole gradient is known.

        Yields:
            Nothing.
        """
        known: set[Tensor] = set()
        with ExitStack() as stack:

            def listen(p: nn.Parameter, leaf: Tensor) -> None:
                if leaf.requires_grad and leaf not in known:
                    known.add(leaf)
                    handle = leaf.register_hook(partial(_hand_over, receive, p))  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)

            def before_forward(module: nn.Module, args: object) -> None:
                if torch.is_grad_enabled():
                    for p, owner, name in self._homes[module]:
                        leaf = getattr(owner, name)
                        if leaf is not p:
                            listen(p, leaf)

            for p in self._plain:
                listen(p, p)
            for module in self._homes:
                stack.callback(module.register_forward_pre_hook(before_forward).remove)
            yield


def _hand_over(receive: Receiver, p: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is not None:  # as it is for outputs that the loss leaves out, under DistributedDataParallel
        receive(p, gradient.detach())


def _own_modules(module: nn.Module) -> Sequence[nn.Module]:
    """Return a sharded module and its parts, without those that are sharded by themselves."""
    found, pending = [], [module]
    while pending:
        part = pending.pop()
        found.append(part)
        pending += [child for child in part.children() if not isinstance(child, FSDPModule)]
    return found
