r"""MARS-M: Muon on gradients that are corrected by the change of the gradient since the last step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, final

from torch import Tensor

from adadagrad.core.checks import check_choice
from adadagrad.optimizers.corrected import AbstractCorrected
from adadagrad.optimizers.orthogonal import orthogonalised


@final
class MARSM(AbstractCorrected):
    r"""Move each matrix along its orthogonalised momentum, which is fed corrected gradients.

    .. math:: W \leftarrow (1 - \eta \lambda) W - 0.2 \, \eta \sqrt{\max(r, c)} \; U V^T, \qquad m = U S V^T

    In code: m is the momentum of the corrected and clipped gradient of `MARS`, W an (r, c) matrix, U V^T five
    Newton-Schulz iterations in bfloat16. The factor makes the update's root mean square about 0.2, that of AdamW, so
    that learning rates carry over. Parameters of other shapes train by AdamW. Embeddings and the last layer should
    too: give them a group with ``which="none"``.

    On matrices only the factor differs from `MARS` with ``variant="shampoo"``, whose notes hold here too. State: m, and
    the last gradient (approximate, with clipping) or the last parameters (exact).

    Args:
        params: Parameters, named parameters or groups; a group may set every option for itself, but for `mode`.
        lr: eta, >= 0.
        beta: Weight of the past in the momentum, in [0, 1).
        eps: > 0, beside the norm in Newton-Schulz, and in AdamW.
        weight_decay: lambda, >= 0, decoupled. The published configurations have 0.1 and 0.01; there is no common one.
        gamma: Scale of the correction, >= 0; as for `MARS`.
        mode: ``"approximate"`` or ``"exact"``; as for `MARS`.
        clip: Shorten the corrected gradient of each matrix to norm 1 where it is longer.
        first_step: As for `MARS`.
        which: ``"2d"`` trains matrices so, ``"none"`` nothing: a group for AdamW.
        lr_1d: Learning rate of that AdamW, > 0, which later changes in proportion to `lr`; None is `lr`.
        betas_1d: Its betas.
        weight_decay_1d: Its decay; None is the group's.
        cautious: Move only entries whose direction agrees with the gradient, the others' share made up for.
        maximize: Ascend instead.
        capturable: Keep the count of steps on the device.

    Raises:
        InvalidArgument: An option is out of its range, a parameter is complex, or `mode` differs between groups.

    Source: Liu and others (2025), "MARS-M", arXiv 2510.21800, and its code AGI-Arena/MARS (verified; the paper's text
        was not readable).
    Differs from the paper: `clip` is read (in the code it is always on); exact mode as in `MARS`. The closed form
        of the approximate mode is used exactly where nothing is clipped, which is where it is equal.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 4))
        >>> optimizer = MARSM([w], lr=0.1)
        >>> w.grad = torch.eye(4)
        >>> optimizer.step()
        >>> bool(w.diagonal().max() < -0.02), bool(w.detach().fill_diagonal_(0).abs().max() < 1e-3)
        (True, True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.025,
        mode: Literal["approximate", "exact"] = "approximate",
        clip: bool = True,
        first_step: Literal["code", "paper"] = "code",
        which: Literal["2d", "none"] = "2d",
        lr_1d: float | None = None,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float | None = None,
        cautious: bool = False,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, options)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse options out of range; see the class.

        Args:
            options: Of a group.
        """
        check_choice("which", options["which"], ("2d", "none"))
        super().check(options)

    def rule(self, group: Mapping[str, Any], param: Tensor) -> str:
        """Return what moves a parameter; see `AbstractCorrected.rule`.

        Args:
            group: Its group.
            param: The parameter.

        Returns:
            The rule's name.
        """
        return "orthogonal" if group["which"] == "2d" and param.ndim == 2 else "plain"

    def direction(self, group: Mapping[str, Any], moment: Tensor) -> Tensor:
        """Return 0.2 sqrt(max(r, c)) U V^T.

        Args:
            group: The group.
            moment: (r, c) matrix.

        Returns:
            (r, c) matrix.
        """
        return orthogonalised(moment, eps=group["eps"]) * (0.2 * math.sqrt(max(moment.shape)))
