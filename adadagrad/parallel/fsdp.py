"""`FullyShard`: every rank holds a shard of the model, as `torch.distributed.fsdp.fully_shard` has cut it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from adadagrad.core.comm import Ranks, all_ranks
from adadagrad.core.errors import InvalidArgument, StepError
from adadagrad.core.shards import Place, is_sharded, place_of
from adadagrad.parallel.base import AbstractParallel, Watch
from adadagrad.parallel.unsharded import UnshardedGradients


@final
class FullyShard(AbstractParallel):
    """Run a step on all ranks of a model on which `fully_shard` (FSDP2) was called: on the whole, on parts, or both.

    A forward gathers parameters, and so is a collective: all ranks run as many micro-batches, those with fewer examples
    one more of weight 0. FSDP2 averages the gradients of what it has sharded; those of the parameters that it has not
    (``ignored_params``, parts that were left out) are averaged here, and must be equal on all ranks when training
    begins. One mesh must hold all ranks: in one dimension, or in two (replicas of shards, HSDP).

    Most optimizers of torch do not take plain and sharded parameters in one group. Leave FSDP2's switches for gradient
    synchronisation and ``set_gradient_divide_factor`` alone.

    Args:
        model: The module, on every rank; none of it still to be sharded.
        reduce_every_micro_batch: Reduce the gradients of every micro-batch, so that no rank ever holds more of them
            than those of the layers in work. False adds up whole gradients on each rank and reduces them once a step:
            fewer messages, and the memory of one unsharded gradient. Micro-batches that are measured are always
            reduced by themselves.

    Raises:
        InvalidArgument: Nothing in the model is sharded, or not over all ranks in one of the two ways.
    """

    gradient: ClassVar[Literal["shared", "sharded", "local"]] = "sharded"
    aligned: ClassVar[bool] = True

    def __init__(self, model: nn.Module, *, reduce_every_micro_batch: bool = True) -> None:
        self._model, self._every = model, reduce_every_micro_batch
        self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if not self._sharded:
            raise InvalidArgument("model has no part that fully_shard has sharded: call fully_shard(model) first")
        self._reshard()
        parameters = list(model.parameters())
        self._plain = [p for p in parameters if not is_sharded(p)]
        self._ranks = all_ranks(next((p.device for p in parameters), None))
        for place in {place_of(p) for p in parameters if is_sharded(p)}:
            _check_place(place, self._ranks.count)
        self._unsharded = UnshardedGradients(model)
        self._aside: dict[nn.Parameter, Tensor] = {}  # plain parameters' gradients that are averaged already
        self._unreduced = self._broken = self._ran = False

    @property
    def module(self) -> nn.Module:
        """The model itself, whose class `fully_shard` has extended."""
        return self._model

    @property
    def ranks(self) -> Ranks:
        """All ranks of the default process group."""
        return self._ranks

    @property
    def watch(self) -> Watch | None:
        """Hands over this rank's own gradients; see `UnshardedGradients`."""
        return self._unsharded.watched

    def begin_step(self, number: int, samples_seen: int) -> None:
        """Put the shards in their places, whatever has been evaluated since, and recover from a step that failed.

        Args:
            number: Its number.
            samples_seen: Examples before it.

        Raises:
            StepError: The step before was left while whole gradients were being added up.
        """
        if self._unreduced:
            raise StepError(
                "a step was left while FSDP2 was adding up whole gradients, which only a reduction empties: use "
                "FullyShard(model, reduce_every_micro_batch=True), or build the model and the engine anew"
            )
        self._aside.clear()
        if self._broken and self._ran:
            for module in _outermost(self._model):
                module.reset_iter_state()
        self._broken = False
        self._reshard()

    @contextmanager
    def micro_batch(self, *, last: bool, measured: bool) -> Iterator[None]:
        """Return a context that reduces gradients as this way wants it; `.grad` holds reduced ones when it is left.

        Args:
            last: Whether it is the step's last micro-batch, which is always reduced.
            measured: Whether its noise is measured, which needs it reduced and the shards in their places.

        Yields:
            Nothing.
        """
        reduce = self._every or last or measured
        if measured:
            self._reshard()
        self._set_aside()
        self._switch(reduce=reduce, last=last or measured)
        try:
            yield
        except BaseException:
            self._broken = True
            raise
        finally:
            self._switch(reduce=True, last=True)
        self._ran, self._unreduced = True, not reduce
        if reduce:
            self._average()

    def _switch(self, *, reduce: bool, last: bool) -> None:
        for module in self._sharded:
            module.set_requires_gradient_sync(reduce, recurse=False)
            module.set_is_last_backward(last)

    def _reshard(self) -> None:
        """Make every module hold its shards: after a forward without backward the outermost holds whole parameters."""
        for module in self._sharded:
            module.reshard()

    def _set_aside(self) -> None:
        """Take away what is averaged already, so that a backward adds to nothing but what is not."""
        if not self._unreduced:
            for p in self._plain:
                if p.grad is not None:
                    self._aside[p], p.grad = p.grad, None

    @torch.no_grad()
    def _average(self) -> None:
        """Average the gradients of the parameters that FSDP2 leaves alone, and add them to those set aside."""
        kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for p in self._plain:
            if p.requires_grad:
                kinds.setdefault((p.device, p.dtype), []).append(p)
        for parameters in kinds.values() if self._ranks.count > 1 else ():
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            present = parts[0].new_tensor([p.grad is not None for p in parameters])
            message = self._ranks.add_(torch.cat([*(part.flatten() for part in parts), present]))
            *found, present = torch.split(message, [*(p.numel() for p in parameters), len(parameters)])
            for p, total, ranks in zip(parameters, found, present.tolist(), strict=True):
                p.grad = total.div_(self._ranks.count).view_as(p) if ranks else None
        for p, before in self._aside.items():
            p.grad = before if p.grad is None else before.add_(p.grad)
        self._aside.clear()


def _outermost(module: nn.Module) -> list[FSDPModule]:
    """Return the sharded modules that lie in no other one."""
    if isinstance(module, FSDPModule):
        return [module]
    return [found for child in module.children() for found in _outermost(child)]


def _check_place(place: Place, ranks: int) -> None:
    """Refuse shards of which the ranks with different examples do not have all."""
    mesh = place.mesh
    if mesh is None or mesh.size() != ranks or len(place.dims) != 1:
        size = 0 if mesh is None else mesh.size()
        raise InvalidArgument(
            f"model is sharded along {len(place.dims)} dimensions of a mesh of {size} ranks, and there are {ranks}: "
            "shard it along one dimension of a mesh of all ranks (tensor and pipeline parallelism are not supported)"
        )
