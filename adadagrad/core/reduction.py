"""How the coordinate-wise ratio V_j / g_j^2 becomes one number: the choice, without the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adadagrad.core.checks import check_choice, check_fraction
from adadagrad.core.errors import InvalidArgument

KINDS = ("max", "quantile", "blocks", "weighted")


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinateReduction:
    """Which reduction of V_j / g_j^2 over coordinates j a policy asks for.

    Args:
        kind: ``"max"`` is the paper's literal maximum over coordinates. Our extensions: ``"quantile"`` over
            coordinates, ``"blocks"`` the maximum over parameter tensors of sum V_j / sum g_j^2, ``"weighted"``
            sum w_j V_j / sum w_j g_j^2 with w_j = 1/sqrt(v_j), v_j the optimizer's second moment.
        quantile: Between 0 and 1, for ``"quantile"`` only.

    Raises:
        InvalidArgument: The kind is unknown, or a quantile is missing, outside [0, 1] or given where unused.
    """

    kind: Literal["max", "quantile", "blocks", "weighted"] = "max"
    quantile: float | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if self.kind == "quantile":
            if self.quantile is None:
                raise InvalidArgument('quantile must be given for kind="quantile", for example quantile=0.9')
            check_fraction(quantile=self.quantile)
        elif self.quantile is not None:
            raise InvalidArgument(f'quantile belongs to kind="quantile", got kind={self.kind!r}')
