"""What one step's backwards have added to the gradients of this process, before any average over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adadagrad.optimizers.base import buckets
from adadagrad.optimizers.extrapolation_noise import TIMES


class LocalGradients:
    """The local gradient of each parameter since the last step, one for each simulated worker.

    It is found in one of two ways. Around a backward, `set_aside` and `record` take out what stands in `.grad` before,
    so that what the backward adds is seen by itself. Or `receive` is told, by what averages gradients over ranks, what
    they were before. Everything is copied: `.grad` may be scaled and clipped afterwards.
    """

    def __init__(self) -> None:
        self._found: dict[Tensor, Tensor] = {}
        self._aside: dict[Tensor, Tensor] | None = None
        self._received: set[Tensor] = set()
        self.mixed = False
        """Whether a gradient was received twice, the second time with an average in it."""

    @property
    def empty(self) -> bool:
        """Whether nothing was found."""
        return not self._found

    def set_aside(self, params: Sequence[Tensor]) -> None:
        """Take the gradients that are there out of `.grad`.

        Args:
            params: Those of which the local gradient is wanted.
        """
        self._aside = {param: param.grad for param in params if param.grad is not None}
        for param in self._aside:
            param.grad = None

    def put_back(self, params: Sequence[Tensor]) -> None:
        """Make `.grad` what it was at `set_aside`, after a backward that has failed.

        Args:
            params: The same as there.
        """
        if self._aside is None:  # it has not come to that
            return
        for param in params:
            param.grad = self._aside.get(param)
        self._aside = None

    @torch.no_grad()
    def record(self, params: Sequence[Tensor], worker: int, workers: int) -> None:
        """Note what has been added to `.grad` since `set_aside`, and add to it what was there before.

        Args:
            params: The same as there.
            worker: Whose gradient it is, from 0.
            workers: K. What is added is taken for the worker's gradient divided by K.
        """
        grads = {p: p.grad for p in params if p.grad is not None and p.grad.layout == torch.strided}
        new = [param for param in grads if param not in self._found]
        old = [param for param in grads if param in self._found]
        for param in new:
            grad = grads[param]
            copy = torch.empty_like(grad) if workers == 1 else grad.new_zeros((workers, *grad.shape))
            self._found[param] = copy
        if workers > 1:
            old, new = [*old, *new], []
        for (places, some), _ in buckets(
            [[self._found[param] for param in new], [grads[param] for param in new]], times=TIMES
        ):
            torch._foreach_copy_(places, some)
        own = [self._found[param] if workers == 1 else self._found[param][worker] for param in old]
        for (places, some), _ in buckets([own, [grads[param] for param in old]], times=TIMES):
            torch._foreach_add_(places, some, alpha=workers)
        for param, before in (self._aside or {}).items():
            if param.grad is not None:
                before.add_(param.grad)
            param.grad = before
        self._aside = None

    def receive(self, param: Tensor, grad: Tensor, *, wanted: bool) -> None:
        """Take the local gradient of a window from what is about to be averaged over ranks.

        Args:
            param: The parameter.
            grad: All that the window has added on this rank.
            wanted: Whether to keep it.
        """
        self.mixed |= param in self._received
        self._received.add(param)
        if wanted:
            self._found[param] = grad.detach().clone().view_as(param)

    def take(self, param: Tensor) -> Tensor | None:
        """Return the local gradient of a parameter, and forget it.

        Args:
            param: The parameter.

        Returns:
            A tensor that nothing else refers to, of its shape or (K, *shape); None where no backward has reached it.
        """
        return self._found.pop(param, None)

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Multiply all that was found.

        Args:
            factor: The factor.
        """
        if self._found:
            torch._foreach_mul_(list(self._found.values()), factor)

    def clear(self) -> None:
        """Begin a new window."""
        self._found.clear()
        self._received.clear()
        self.mixed = False

    def zero_aside(self, *, set_to_none: bool) -> None:
        """Do to what is set aside what `zero_grad` does to `.grad`.

        Args:
            set_to_none: Whether to drop it.
        """
        if self._aside and set_to_none:
            self._aside.clear()
        elif self._aside:
            torch._foreach_zero_(list(self._aside.values()))
