"""Calls that are seen whole: run them, see whether they can be redone, and copy their outputs behind a tap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from adadagrad.statistics.places import Dims
from adadagrad.statistics.rules import AbstractWholeRule
from adadagrad.statistics.rules.whole import RecordedCall, version
from adadagrad.statistics.taps import CollectMany, ManyTap


@dataclass(slots=True, eq=False)
class WholeCall:
    """One call of a layer, made, with all that came in and went out.

    Args:
        layer: The module.
        forward: Its own forward.
        leaves: Everything in its arguments, tensors as they came.
        spec: How the leaves make up the arguments.
        autocast: Precision that autocast computed in, by device type.
        random: The state of the random numbers before the call, by device.
        versions: Of the tensor arguments, to see whether one is changed in place.
    """

    layer: nn.Module
    forward: Callable[..., Any]
    leaves: list[Any]
    spec: TreeSpec
    autocast: dict[str, torch.dtype]
    random: dict[torch.device, Tensor]
    versions: list[int]
    outputs: list[Any] = field(default_factory=list)
    output_spec: TreeSpec | None = None
    repeatable: bool = True

    @classmethod
    def make(
        cls,
        layer: nn.Module,
        forward: Callable[..., Any],
        rule: AbstractWholeRule[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> WholeCall:
        """Call the layer.

        Args:
            layer: The module.
            forward: Its own forward.
            rule: Its rule.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            The call; `repeatable` says whether it left everything as it was but for what the rule can bear.
        """
        leaves, spec = tree_flatten((args, kwargs))
        state = [*layer.parameters(), *layer.buffers()]
        devices = {t.device for t in [*state, *leaves] if isinstance(t, Tensor)} | {torch.device("cpu")}
        kinds = {d.type: torch.get_autocast_dtype(d.type) for d in devices if torch.is_autocast_enabled(d.type)}
        random, before = _random_state(devices), [version(t) for t in state]
        call = cls(layer, forward, leaves, spec, kinds, random, [version(leaf) for leaf in leaves])
        call.outputs, call.output_spec = tree_flatten(forward(*args, **kwargs))
        drew = any(not torch.equal(random[d], now) for d, now in _random_state(devices).items())
        kept = [before, call.versions] == [[version(t) for t in some] for some in (state, leaves)]
        call.repeatable = kept and not (drew and not rule.may_draw(layer))
        return call

    @property
    def result(self) -> Any:
        """What the layer returned."""
        assert self.output_spec is not None
        return tree_unflatten(self.outputs, self.output_spec)

    @property
    def differentiated(self) -> list[int]:
        """Numbers of the outputs that autograd differentiates."""
        return [k for k, y in enumerate(self.outputs) if isinstance(y, Tensor) and y.requires_grad]

    @property
    def shapes(self) -> tuple[torch.Size | None, ...]:
        """Shapes of arguments and outputs."""
        return tuple(v.shape if isinstance(v, Tensor) else None for v in (*self.leaves, *self.outputs))

    def reached(self) -> set[nn.Parameter]:
        """Return the parameters that the outputs depend on between the layer's inputs and them, as autograd saw it."""
        stop = {leaf.grad_fn for leaf in self.leaves if isinstance(leaf, Tensor)}
        pending = [self.outputs[k].grad_fn for k in self.differentiated]
        seen, found = {None, *stop}, set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if isinstance(p := getattr(node, "variable", None), nn.Parameter):
                found.add(p)
            pending.extend(child for child, _ in node.next_functions)
        return found

    def tap(self, collect: CollectMany, leaf: Tensor) -> None:
        """Put copies in the place of the outputs that autograd differentiates.

        Args:
            collect: Takes their gradients.
            leaf: The dummy leaf.
        """
        numbers = self.differentiated
        copies = ManyTap.apply(collect, leaf, *(self.outputs[k] for k in numbers))  # type: ignore[no-untyped-call]
        for number, copy in zip(numbers, copies, strict=True):
            self.outputs[number] = copy

    def recorded(self, dims: Dims) -> RecordedCall | None:
        """Return what a rule is given, None where an output has no examples.

        Args:
            dims: Where the examples are.
        """
        numbers = self.differentiated
        output_dims = [dims[1][number] for number in numbers]
        if not self.repeatable or not numbers or min(output_dims) < 0:
            return None
        detached = {id(leaf): leaf.detach() for leaf in self.leaves if isinstance(leaf, Tensor)}
        leaves = [detached.get(id(leaf), leaf) for leaf in self.leaves]  # a tensor given twice stays one
        return RecordedCall(
            self.layer,
            self.forward,
            leaves,
            self.spec,
            dims[0],
            numbers,
            output_dims,
            self.autocast,
            self.random,
            self.versions,
        )


def _random_state(devices: set[torch.device]) -> dict[torch.device, Tensor]:
    """Return the state of the random numbers of these devices, those of them that have one."""
    found = {}
    for device in devices:
        if device.type == "cpu":
            found[device] = torch.get_rng_state()
        elif device.type == "cuda":
            found[device] = torch.cuda.get_rng_state(device)
    return found
