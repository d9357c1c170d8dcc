"""One batch at two places: the gradient at the present parameters, and at those before the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from adadagrad.core.shards import local_part


class RandomStates:
    """The states of torch's default generators on the CPU and on some devices, at one moment.

    Args:
        devices: Where parameters are.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        used = dict.fromkeys(device for device in devices if device.type == "cuda")
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in used]

    def restore(self) -> None:
        """Set the generators back to that moment."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)


@contextmanager
def moved_to(params: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Give parameters other values inside, and their own back on leaving, bit for bit, also after an error.

    What autocast has cast of them is forgotten at both ends: it would be used again, at values that are no longer so.

    Args:
        params: The parameters, which are changed in place.
        values: Their values inside; left as they are.

    Yields:
        Nothing.
    """
    own = [local_part(param) for param in params]
    kept = [part.clone() for part in own]
    with torch.no_grad():
        torch._foreach_copy_(own, [local_part(value) for value in values])
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(own, kept)
        torch.clear_autocast_cache()


def gradients_there(
    closure: Callable[[], float], params: Sequence[Tensor], values: Sequence[Tensor], random: RandomStates
) -> list[Tensor | None]:
    """Evaluate a closure at other values of the parameters, and return its gradients.

    The parameters, their gradients and the random generators are afterwards what they were before.

    Args:
        closure: Computes the loss and its gradients.
        params: The parameters.
        values: Where the gradients are wanted.
        random: What the random numbers shall be.

    Returns:
        A gradient for each parameter; None where there is none.
    """
    now = RandomStates([param.device for param in params])
    # Copies: a wrapper such as DistributedDataParallel may write the second gradients to the place of the first.
    here = [None if param.grad is None else param.grad.clone() for param in params]
    random.restore()
    try:
        with moved_to(params, values):
            for param in params:
                param.grad = None
            with torch.enable_grad():
                closure()
            return [None if param.grad is None else param.grad.detach().clone() for param in params]
    finally:
        now.restore()
        for param, grad in zip(params, here, strict=True):
            param.grad = grad
