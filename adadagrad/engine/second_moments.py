"""The second moments that the weighted reduction divides by: where an optimizer keeps them, and whether it does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor, nn

from adadagrad.core.errors import InvalidArgument
from adadagrad.core.reduction import CoordinateReduction
from adadagrad.optimizers.adagrad_norm import AdaGradNorm

KNOWN = (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)
"""Optimizers of torch that keep a second moment; of optimizers from elsewhere it is seen after their first update."""


class SecondMoments:
    """An optimizer's second moments, for a policy that may want them.

    Args:
        optimizer: The optimizer.
        reduction: The policy's; only ``"weighted"`` wants them, and None wants nothing.

    Raises:
        InvalidArgument: They are wanted, and the optimizer is known to keep none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, reduction: CoordinateReduction | None) -> None:
        self._optimizer = optimizer
        self._wanted = reduction is not None and reduction.kind == "weighted"
        familiar = type(optimizer).__module__.startswith("torch.optim") or isinstance(optimizer, AdaGradNorm)
        if self._wanted and familiar and not isinstance(optimizer, KNOWN):
            self._refuse()

    def of(self, p: nn.Parameter) -> Tensor | None:
        """Return a parameter's second moment [grad^2] as Adagrad or Adam keeps it, None where there is none.

        Args:
            p: The parameter.

        Returns:
            The optimizer's own tensor, of the parameter's shape.
        """
        state = self._optimizer.state.get(p, {})
        moment: Tensor | None = state.get("sum", state.get("exp_avg_sq"))
        return moment

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """Refuse an optimizer whose first applied step has left no second moment, where they are wanted.

        Args:
            parameters: The model's parameters.

        Raises:
            InvalidArgument: None of them has one.
        """
        if self._wanted and all(self.of(p) is None for p in parameters):
            self._refuse()

    def _refuse(self) -> NoReturn:
        raise InvalidArgument(
            f'reduction="weighted" needs an optimizer with second moments, got {type(self._optimizer).__name__}: '
            "use Adagrad, Adam or AdamW, or another reduction"
        )
