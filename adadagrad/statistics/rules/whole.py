"""What a whole rule is: the exact rule of a layer that takes or returns several tensors, or does several things.

Such a layer's call is recorded with all its arguments. Once every output has its gradient, the rule says what the call
amounts to: one or more *parts*, each an input and an output gradient with the examples first and an ordinary
`AbstractRule`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from adadagrad.statistics.rules.base import AbstractRule, Layer


@dataclass(frozen=True, slots=True, eq=False)
class RecordedCall:
    """One call of a layer: its arguments, and where the examples are in them and in its outputs.

    Args:
        layer: The module.
        forward: Its own forward.
        leaves: Everything in the arguments, tensors detached.
        spec: How the leaves make up the positional and the keyword arguments.
        dims: Batch dimension of every leaf; -1 for what all examples share and for what is no tensor,
            less where the examples are somewhere else in it.
        outputs: Numbers of the outputs (as leaves of what the layer returned) that autograd differentiates.
        output_dims: Batch dimensions of these.
        autocast: Precision that autocast computed in, by device type; none where it was off.
        random: The state of the random numbers before the call, by device.
        versions: Of the leaves, when the call began.
    """

    layer: nn.Module
    forward: Callable[..., Any]
    leaves: Sequence[Any]
    spec: TreeSpec
    dims: Sequence[int]
    outputs: Sequence[int]
    output_dims: Sequence[int]
    autocast: Mapping[str, torch.dtype]
    random: Mapping[torch.device, Tensor]
    versions: Sequence[int]

    def untouched(self) -> bool:
        """Return whether no argument has been changed in place since: a detached tensor shares the version."""
        return list(self.versions) == [version(leaf) for leaf in self.leaves]

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the keyword arguments."""
        args, kwargs = tree_unflatten(list(self.leaves), self.spec)
        return args, kwargs

    def redo(self, parameters: Mapping[str, Tensor], leaves: Sequence[Any]) -> list[Tensor]:
        """Run the layer's own forward, without hooks, with other parameters and other arguments.

        Args:
            parameters: What takes the place of the parameters, by their name in the layer.
            leaves: What takes the place of `leaves`.

        Returns:
            The outputs that autograd differentiates.
        """
        args, kwargs = tree_unflatten(list(leaves), self.spec)
        shell = _Shell(self.layer, self.forward)
        places = {f"layer.{name}": value for name, value in parameters.items()}
        with self.precision():
            found = tree_leaves(torch.func.functional_call(shell, places, args, kwargs))
        return [found[number] for number in self.outputs]

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Compute as the call did, under autocast or without."""
        with ExitStack() as stack:
            for kind, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype))
            yield


def version(value: Any) -> int:
    """Return how often a tensor has been changed in place, 0 for anything else."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class _Shell(nn.Module):
    """A layer under the name ``layer``, called without its hooks and taps."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self._own_forward = layer, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns."""
        return self._own_forward(*args, **kwargs)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What a call, or a piece of it, amounts to.

    Args:
        rule: The rule that counts it.
        x: Its input, examples first (n, ...).
        gy: The gradient of its output, examples first (n, ...).
        names: Name that the rule knows a parameter by -> the parameter's name in the layer.
    """

    rule: AbstractRule[Any]
    x: Tensor
    gy: Tensor
    names: Mapping[str, str]


class AbstractWholeRule(abc.ABC, Generic[Layer]):
    """Exact per-example statistics of a layer family whose calls have to be seen whole."""

    @abc.abstractmethod
    def suits(self, layer: Layer) -> bool:
        """Return whether the layer, as it is set up and trained now, can be counted; else the fallback does it.

        Args:
            layer: The module.
        """

    @abc.abstractmethod
    def may_draw(self, layer: Layer) -> bool:
        """Return whether calls that draw random numbers can be counted.

        Args:
            layer: The module.
        """

    @abc.abstractmethod
    def parts(self, call: RecordedCall, gradients: Sequence[Tensor | None], names: Collection[str]) -> list[Part]:
        """Return what a call amounts to. Runs inside the backward; must leave layer and arguments as they are.

        Args:
            call: The call.
            gradients: The gradients of its outputs, None for 0.
            names: The layer's parameters that are wanted.

        Returns:
            Parts that hold the wanted parameters, each at least once; a parameter of several parts has the sum of
            their gradients.
        """
