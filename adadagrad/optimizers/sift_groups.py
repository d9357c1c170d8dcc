"""Which tensors of a model SIFT trains sparsely, which whole, and which not at all: by patterns on their names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from adadagrad.core.errors import InvalidArgument


def sift_groups(
    model: nn.Module, include: Sequence[str], dense: Sequence[str] = (), **options: Any
) -> list[dict[str, Any]]:
    """Return parameter groups for `SIFT`, and freeze every parameter that is in none of them.

    Args:
        model: The model; parameters that match no pattern get ``requires_grad=False``.
        include: Patterns of names whose tensors are trained sparsely, such as ``"*.query.weight"``. Biases are only
            those that a pattern names.
        dense: Patterns of names whose tensors are trained whole, such as ``"classifier.*"``; they come first.
        **options: Of the sparse group, such as `rate`.

    Returns:
        A group of named parameters with ``rate=None`` for `dense`, where there are any, and one for `include`.

    Raises:
        InvalidArgument: A pattern matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> groups = sift_groups(model, include=["0.weight"], dense=["1.*"])
        >>> [[name for name, _ in group["params"]] for group in groups], model[0].bias.requires_grad
        ([['1.weight', '1.bias'], ['0.weight']], False)
    """
    named = dict(model.named_parameters())
    for pattern in (*include, *dense):
        if not any(fnmatchcase(name, pattern) for name in named):
            known = ", ".join(list(named)[:5])
            raise InvalidArgument(f"pattern {pattern!r} matches no parameter: their names are like {known}")
    whole = [name for name in named if any(fnmatchcase(name, pattern) for pattern in dense)]
    sparse = [name for name in named if name not in whole and any(fnmatchcase(name, pattern) for pattern in include)]
    for name, param in named.items():
        param.requires_grad_(name in whole or name in sparse)
    groups = [{"params": [(name, named[name]) for name in whole], "rate": None}] if whole else []
    return [*groups, {"params": [(name, named[name]) for name in sparse], **options}]
