"""What the engine asks of a way to run one step on many devices; the ways are files beside this one."""

from __future__ import annotations

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from adadagrad.core.comm import Ranks
from adadagrad.core.records import GradientStatistics

Watch: TypeAlias = Callable[[Callable[[nn.Parameter, Tensor], None]], AbstractContextManager[None]]
"""Given a function, returns a context whose backwards hand it every parameter and this rank's own gradient for it."""


class AbstractParallel(abc.ABC):
    """How the processes that share a step make one gradient of it.

    Each rank runs its own part of a step's examples in micro-batches, the loss of an example weighing as much
    everywhere. torch.distributed does the rest; processes are started by ``torchrun``.
    """

    gradient: ClassVar[Literal["shared", "sharded", "local"]]
    """What `.grad` holds on a rank once a step's backward is over; see `adadagrad.statistics.base.Request`."""

    aligned: ClassVar[bool]
    """Whether every rank must run as many micro-batches as the others, because a forward is a collective."""

    whole: int = 0
    """Examples of every micro-batch but a rank's last one of an epoch, where a trainer counts micro-batches, so that
    none may be split and all ranks must run as many; 0 where the engine cuts as it likes. To be set before the engine
    is made, with batches that are multiples of it on every rank and ``epoch_boundary="short"``."""

    @property
    @abc.abstractmethod
    def module(self) -> nn.Module:
        """The user's own module, without a wrapper: what is measured and saved."""

    @property
    @abc.abstractmethod
    def ranks(self) -> Ranks:
        """The processes that share a step."""

    @property
    def watch(self) -> Watch | None:
        """How this rank's own gradients are seen; None where hooks on the parameters themselves see them."""
        return None

    @property
    def meets(self) -> bool:
        """Whether the ranks talk to each other in the present step; where they do not, nothing is decided or saved."""
        return True

    @property
    def together(self) -> bool:
        """Whether all ranks hold the same model between the steps, so that one of them can save it for all."""
        return True

    @property
    def shows_noise(self) -> bool:
        """Whether `after_update` tells what the noise is, so that nothing is measured in the backward."""
        return False

    @property
    def own_optimizer_state(self) -> bool:
        """Whether every rank's optimizer has a state of its own, which must be saved for each."""
        return False

    @property
    def own_data(self) -> bool:
        """Whether every rank is given a data set of its own, and reads all of it."""
        return False

    def begin_step(self, number: int, samples_seen: int) -> None:  # noqa: B027 (most ways have nothing to do)
        """Say which step comes next; here nothing depends on it.

        Args:
            number: Its number, from 1.
            samples_seen: Examples whose update has been applied before it.
        """

    def occasion(self, number: int) -> int:
        """Return the number by which ``Measure(every=k)`` counts.

        Args:
            number: The step's own.
        """
        return number

    def after_update(self, examples: int, weight: float) -> GradientStatistics | None:
        """Do what follows on the optimizer's step; here nothing, because all ranks have made the same one.

        Args:
            examples: This rank's in the step.
            weight: What they weigh: their number, or their weights in sum.

        Returns:
            What the noise is, where `shows_noise`.
        """
        return None

    def finish(self) -> None:  # noqa: B027
        """Do what is left when the run's last step is over."""

    def log_fields(self) -> dict[str, float]:
        """Return what a line of the log says of the ranks' messages; nothing where they are the same at every step."""
        return {}

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs to know, as plain numbers."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:  # noqa: B027
        """Take over the state of another run.

        Args:
            state: What `state_dict` returned.
        """

    @abc.abstractmethod
    def micro_batch(self, *, last: bool, measured: bool) -> AbstractContextManager[None]:
        """Return a context for the forward and backward of one micro-batch.

        Args:
            last: Whether it is this rank's last one in the step.
            measured: Whether its noise is measured.

        Returns:
            A context in which gradients are synchronised between ranks or not, as this way wants it.
        """
