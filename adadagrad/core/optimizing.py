"""What an optimizer may offer beyond torch's own interface, and what the engine then does for it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Reevaluating(Protocol):
    """An optimizer that may evaluate a step's batch at other parameters, through the closure given to `step`.

    The closure's first call is at the present parameters. Where it raises, the optimizer leaves the parameters as they
    were.
    """

    @property
    def needs_closure(self) -> bool:
        """Whether `step` needs a closure."""
        ...


EVERYTHING = "*"
"""In `RemembersApart.no_mean`: nothing of the state has a mean."""


@runtime_checkable
class RemembersApart(Protocol):
    """An optimizer that says which entries of its state have no mean over ranks that train apart for a while."""

    @property
    def no_mean(self) -> frozenset[str]:
        """Keys of ``optimizer.state`` that stay each rank's own; `EVERYTHING` where all of it must."""
        ...


@runtime_checkable
class Extrapolating(Protocol):
    """An optimizer that evaluates gradients away from its parameters; outside `extrapolated` they are the true ones."""

    @property
    def needs_local_gradients(self) -> bool:
        """Whether it must be shown each rank's own gradient, which a wrapper averages in the backward."""
        ...

    @property
    def own_state(self) -> bool:
        """Whether its state differs between ranks that train one model, so that each must be saved."""
        ...

    def extrapolated(self) -> AbstractContextManager[None]:
        """Return a context around a step's forwards and backwards, in which the parameters are displaced."""
        ...

    def scale_local_(self, factor: float) -> None:
        """Multiply what it has kept of the present step's gradient by what the gradient itself was multiplied by."""
        ...

    def forget_local_gradients(self) -> None:
        """Set what differs between ranks to 0."""
        ...


@runtime_checkable
class TakesGradients(Protocol):
    """An optimizer that takes gradients out of `.grad` as a backward makes them."""

    @property
    def takes_gradients(self) -> bool:
        """Whether it does so, as it is set up."""
        ...

    def gradients(self) -> list[Tensor]:
        """Return what it has taken and not yet used, to be scaled and clipped in place."""
        ...
