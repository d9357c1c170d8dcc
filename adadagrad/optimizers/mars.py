r"""MARS: momentum on gradients that are corrected by the change of the gradient since the last step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, final

from torch import Tensor

from adadagrad.core.checks import check_choice
from adadagrad.optimizers.corrected import AbstractCorrected
from adadagrad.optimizers.orthogonal import orthogonalised

VARIANTS = ("adamw", "lion", "shampoo")
WHICH = ("ndim>=2", "2d", "all", "none")


@final
class MARS(AbstractCorrected):
    r"""AdamW, Lion or an orthogonalised update on gradients corrected as in STORM.

    .. math:: c_t = g_t + \gamma \frac{\beta_1}{1 - \beta_1} (g_t - h_t), \quad
        \tilde c_t = \frac{c_t}{\max(1, \|c_t\|)}, \quad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \tilde c_t

    and then, by `variant`, with v the same average of c̃² under beta_2, bias-corrected both:

    .. math:: x \leftarrow x - \eta \Big( \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda x \Big), \quad
        x \leftarrow x - \eta (\operatorname{sign} m + \lambda x), \quad
        x \leftarrow x - \eta \big( \sqrt{\max(1, r/c)} \, U V^T + \lambda x \big)

    In code: g_t is `.grad`; the norm is that of one tensor. h_t is, in mode ``"exact"``, the gradient of the same batch
    at the parameters before the last step, for which `step` calls its closure twice, with the same random numbers (with
    dropout both see the same masks; batch normalisation counts the batch twice: `AdaptiveBatch(replay=True)` puts its
    statistics back). In mode ``"approximate"`` it is the last step's gradient.

    What it is for: exact mode reduces the variance of the momentum, at the price of a second forward and backward.
    Approximate mode does not, for noise that is independent from step to step: Var(c) is ((1+k)² + k²) times that of
    g, k = gamma beta_1 / (1 - beta_1) (derived). Without clipping its momentum is exactly (1 - b') g_t + b' M_{t-1}
    with b' = beta_1 (1 - gamma) and M the plain average (derived), a slightly fresher momentum; under ``"lion"`` and
    ``"shampoo"`` that is how it is then computed, and needs no buffer for the last gradient. Change ``group["gamma"]``
    while training to schedule it: that closed form then takes the present gamma for the whole past.

    State, in tensors of the parameter's size and kind: m; v for ``"adamw"``; the last gradient (approximate) or the
    last parameters (exact, of all parameters, and three more while a step is under way). In bfloat16 an average with a
    beta of 0.999 does not forget: keep parameters in float32 there, under autocast. Under `fully_shard` each tensor's
    norm costs 8 bytes to the other ranks, and ``"shampoo"`` gathers whole matrices. In exact mode gradients of
    parameters that are in no group are left from the second evaluation: give all parameters of the closure to it.

    Args:
        params: Parameters, named parameters or groups; a group may set every option for itself, but for `mode`.
        lr: eta, >= 0.
        betas: beta_1 and beta_2, in [0, 1).
        eps: > 0, beside the root of v, and beside the norm in Newton-Schulz.
        weight_decay: lambda, >= 0, decoupled.
        gamma: Scale of the correction, >= 0, dimensionless; 0 is the base optimizer on the clipped gradient. Above 0.1
            the approximate mode warns: it adds noise.
        variant: ``"adamw"``, ``"lion"`` or ``"shampoo"``; the last is for matrices, and AdamW for other shapes.
        mode: ``"approximate"`` or ``"exact"``, the same for all groups.
        clip: Shorten c of each tensor to norm 1 where it is longer.
        first_step: What h is at the first step: ``"code"`` 0, as in the published runs; ``"paper"`` g.
        which: The tensors that are trained so; the rest trains by AdamW: ``"ndim>=2"``, ``"2d"`` (as in the published
            code: convolutions train by AdamW), ``"all"`` or ``"none"``.
        lr_1d: Learning rate of that AdamW, > 0, which later changes in proportion to `lr`; None is `lr`.
        betas_1d: Its betas.
        weight_decay_1d: Its decay; None is the group's.
        cautious: Move only entries whose direction agrees with the gradient, the others' share made up for.
        maximize: Ascend instead.
        capturable: Keep the count of steps on the device, so that nothing is read back, for CUDA graphs.

    Raises:
        InvalidArgument: An option is out of its range, a parameter is complex, or `mode` differs between groups.

    Source: Yuan and others (2024), "MARS", arXiv 2411.10438, and its code AGI-Arena/MARS (verified; the paper's text
        was not readable). Cautious: Liang and others (2024), arXiv 2411.16085.
    Differs from the paper: v averages the squares of the clipped c̃, as the code does, where the paper's summary squares
        g. From the code: exact mode re-evaluates the present batch at the last parameters, where the code evaluates the
        next batch ahead; the last gradient is a copy; all tensors of two and more dimensions are trained so; the decay
        of the others is the group's unless `weight_decay_1d` is given (there 0.1); every option holds per group.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = MARS([x], lr=0.1, mode="exact")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = x.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item(), round(x[0, 0].item(), 3)
        (4.0, 0.9)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.025,
        variant: Literal["adamw", "lion", "shampoo"] = "adamw",
        mode: Literal["approximate", "exact"] = "approximate",
        clip: bool = True,
        first_step: Literal["code", "paper"] = "code",
        which: Literal["ndim>=2", "2d", "all", "none"] = "ndim>=2",
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
        check_choice("variant", options["variant"], VARIANTS)
        check_choice("which", options["which"], WHICH)
        super().check(options)

    def rule(self, group: Mapping[str, Any], param: Tensor) -> str:
        """Return what moves a parameter; see `AbstractCorrected.rule`.

        Args:
            group: Its group.
            param: The parameter.

        Returns:
            The rule's name.
        """
        which, dims = group["which"], param.ndim
        if which == "none" or (which == "2d" and dims != 2) or (which == "ndim>=2" and dims < 2):
            return "plain"
        if group["variant"] == "shampoo":
            return "orthogonal" if dims == 2 else "adamw"
        return str(group["variant"])

    def direction(self, group: Mapping[str, Any], moment: Tensor) -> Tensor:
        """Return sqrt(max(1, r/c)) U V^T of the bias-free momentum.

        Args:
            group: The group.
            moment: (r, c) matrix.

        Returns:
            (r, c) matrix.
        """
        rows, columns = moment.shape
        found = orthogonalised(moment / (1 - group["betas"][0]), eps=group["eps"])
        return found * math.sqrt(max(1, rows / columns))
