"""What a model is made of just before a measured forward: one walk over its modules, which answers all questions.

The walk is made for every measured micro-batch, so that a module that was added, replaced, frozen or put into training
mode since the last one is seen. It costs some microseconds a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from adadagrad.statistics.broadcast import RAW, CallKey
from adadagrad.statistics.compiled import is_compiled
from adadagrad.statistics.coverage import is_batch_coupled
from adadagrad.statistics.rules import AbstractRule, AbstractWholeRule, find_rule, find_whole
from adadagrad.statistics.rules.base import own_parameters


@dataclass(frozen=True, slots=True)
class Survey:
    """What one walk has found.

    Args:
        parameters: The trainable parameters by qualified name, as `named_parameters` orders and names them.
        layers: Name, module and rule of every layer that a rule counts.
        whole: Name, module and rule of every other layer whose calls are seen whole.
        raw: Trainable parameters that belong to none of `layers`, with their keys.
        coupled: The first module that mixes examples, by name; None where none does.
        replaced: Name and module wherever `forward` is set on the instance.
        compiled: Modules that `torch.compile` has wrapped or compiled in place.
    """

    parameters: dict[str, nn.Parameter]
    layers: list[tuple[str, nn.Module, AbstractRule[Any]]]
    whole: list[tuple[str, nn.Module, AbstractWholeRule[Any]]]
    raw: dict[nn.Parameter, CallKey]
    coupled: tuple[str, nn.Module] | None
    replaced: list[tuple[str, nn.Module]]
    compiled: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Survey:
        """Walk over a model.

        Args:
            model: The model as it is now.

        Returns:
            What it is made of.
        """
        parameters: dict[str, nn.Parameter] = {}
        layers: list[tuple[str, nn.Module, AbstractRule[Any]]] = []
        whole: list[tuple[str, nn.Module, AbstractWholeRule[Any]]] = []
        replaced: list[tuple[str, nn.Module]] = []
        compiled: list[nn.Module] = []
        coupled: tuple[str, nn.Module] | None = None
        known: set[nn.Parameter] = set()
        ruled: set[nn.Parameter] = set()
        for name, module in _modules(model):
            if "forward" in module.__dict__:
                replaced.append((name, module))
            if is_compiled(module):
                compiled.append(module)
            if coupled is None and is_batch_coupled(module):
                coupled = (name, module)
            if not module._parameters and not module._modules:
                continue
            for own, p in module._parameters.items():
                if p is not None and p not in known:
                    known.add(p)
                    if p.requires_grad:
                        parameters[f"{name}.{own}" if name else own] = p
            rule = find_rule(module)
            if rule is None:
                if (seen_whole := _whole_rule(module, model)) is not None:
                    whole.append((name, module, seen_whole))
            elif trained := own_parameters(module):
                layers.append((name, module, rule))
                ruled.update(trained.values())
        raw = {p: (name, RAW) for name, p in parameters.items() if p not in ruled}
        return cls(parameters, layers, whole, raw, coupled, replaced, compiled)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `named_modules` yields, in its order; a deep model's generators inside generators take their time."""
    known: set[nn.Module] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        name, module = pending.pop()
        if module in known:
            continue
        known.add(module)
        yield name, module
        if module._modules:
            prefix = f"{name}." if name else ""
            pending += [(prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None]


def _whole_rule(module: nn.Module, model: nn.Module) -> AbstractWholeRule[Any] | None:
    """Return the whole rule of a module that trains something, None where it has none."""
    rule = find_whole(module, outermost=module is model)
    return rule if rule is not None and any(p.requires_grad for p in module.parameters()) else None
