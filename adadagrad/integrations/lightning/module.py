"""Which module is measured, and how its steps run on several devices.

Per-example statistics are taken of a module whose forward is called with the examples. A LightningModule's own forward
often is not: `training_step` calls a module that it holds. So the module that holds everything trainable is measured.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, final

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adadagrad.core.comm import Ranks
from adadagrad.core.errors import InvalidArgument
from adadagrad.parallel import AbstractParallel, DataParallel, recognise


def measured_module(whole: nn.Module, name: str | None) -> nn.Module:
    """Return the module whose forward `training_step` calls.

    Args:
        whole: The LightningModule.
        name: What the user says: a qualified name, ``""`` for the LightningModule itself; None finds it.

    Returns:
        That one; or the only child that holds all trainable parameters; or the LightningModule itself.

    Raises:
        InvalidArgument: There is no such module, or it holds only a part of what is trained.
    """
    trainable = {p for p in whole.parameters() if p.requires_grad}

    def holds(module: nn.Module) -> bool:
        return trainable <= set(module.parameters())

    if name is None:
        children = [child for child in whole.children() if holds(child)]
        called = len(children) == 1 and not isinstance(children[0], nn.ModuleList | nn.ModuleDict)
        return children[0] if called and trainable else whole
    try:
        module = whole.get_submodule(name)
    except AttributeError as error:
        raise InvalidArgument(f"module={name!r} is not in the LightningModule: {error}") from error
    if not holds(module):
        raise InvalidArgument(
            f"module={name!r} must hold all trainable parameters: name the module that training_step calls with the "
            "batch, or freeze the others"
        )
    return module


def parallel_of(strategy_model: nn.Module | None, module: nn.Module) -> AbstractParallel:
    """Return how the steps of a module run.

    Args:
        strategy_model: What Lightning's strategy has made of the LightningModule.
        module: The measured module in it.
    """
    if isinstance(strategy_model, DistributedDataParallel):
        return PartOfReplica(DataParallel(strategy_model), module)
    return recognise(module)


@final
class PartOfReplica(AbstractParallel):
    """Run a step of a replica that Lightning synchronises, and measure a part of the wrapped module.

    Lightning holds the synchronisation back in every micro-batch after which it does not step the optimizer, in a
    context that it opens after the callback's hooks and leaves after them: a second one in between would be restored in
    the wrong order, and ranks would drift apart.

    Args:
        whole: How the wrapped module's steps run.
        module: The part.
    """

    gradient: ClassVar[Literal["shared", "sharded", "local"]] = "shared"
    aligned: ClassVar[bool] = False

    def __init__(self, whole: DataParallel, module: nn.Module) -> None:
        self._whole, self._module = whole, module

    @property
    def module(self) -> nn.Module:
        """The part."""
        return self._module

    @property
    def ranks(self) -> Ranks:
        """The ranks of the wrapper."""
        return self._whole.ranks

    def micro_batch(self, *, last: bool, measured: bool) -> AbstractContextManager[None]:
        """Return a context that does nothing; see the class."""
        return nullcontext()


@final
class FirstCall:
    """Finds out whether `training_step` calls the measured module, in the first micro-batch that is measured.

    Args:
        module: The measured module.
        name: Its class, for the message.
    """

    def __init__(self, module: nn.Module) -> None:
        self._name, self._called = type(module).__name__, False
        self._handle = module.register_forward_pre_hook(self._note)

    def close(self, *, needed: bool) -> None:
        """Take the hook away.

        Args:
            needed: Whether the module must have been called by now.

        Raises:
            InvalidArgument: It must, and was not.
        """
        self._handle.remove()
        if needed and not self._called:
            raise InvalidArgument(
                f"training_step did not call {self._name}(...), whose forward is measured: call self(...) there, name "
                "the module that it calls (AdaptiveBatchCallback(module=...)), or measure by "
                "Measure(estimator=MicroBatch())"
            )

    def _note(self, *arguments: Any) -> None:
        self._called = True
