"""What ``--optimizer`` may name: the table from names to optimizers.

To make a new optimizer known to the command line, add a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from adadagrad.cli.config import OptimizerOptions
from adadagrad.cli.names import find
from adadagrad.core.checks import check_at_least
from adadagrad.core.errors import InvalidArgument
from adadagrad.optimizers import (
    MARS,
    MARSM,
    SIFT,
    AdaGradNorm,
    AdaRankGrad,
    ExtrapolatedAdam,
    ExtrapolatedSGD,
    LaMAdam,
    MAdam,
    OverTheAirAdaGrad,
    OverTheAirAdam,
)

OPTIMIZERS: Mapping[str, Callable[[Iterable[nn.Parameter], OptimizerOptions], torch.optim.Optimizer]] = {
    "adagrad": lambda params, o: torch.optim.Adagrad(params, lr=o.lr, weight_decay=o.weight_decay),
    "adagrad-norm": lambda params, o: AdaGradNorm(params, lr=o.lr, weight_decay=o.weight_decay),
    "sgd": lambda params, o: torch.optim.SGD(params, lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay),
    "adam": lambda params, o: torch.optim.Adam(params, lr=o.lr, weight_decay=o.weight_decay),
    "adamw": lambda params, o: torch.optim.AdamW(params, lr=o.lr, weight_decay=o.weight_decay),
    "mars": lambda params, o: MARS(
        params, lr=o.lr, weight_decay=o.weight_decay, gamma=o.gamma, variant=o.mars_variant, mode=o.mars_mode
    ),
    "mars-m": lambda params, o: MARSM(params, lr=o.lr, weight_decay=o.weight_decay, gamma=o.gamma, mode=o.mars_mode),
    "madam": lambda params, o: MAdam(params, lr=o.lr, weight_decay=o.weight_decay),
    "lamadam": lambda params, o: LaMAdam(params, lr=o.lr, weight_decay=o.weight_decay),
    "adarankgrad": lambda params, o: AdaRankGrad(params, lr=o.lr, weight_decay=o.weight_decay, max_rank=o.max_rank),
    "sift": lambda params, o: _sift(params, o),
    "extrapolated-sgd": lambda params, o: ExtrapolatedSGD(
        params,
        lr=o.lr,
        momentum=o.momentum,
        extrapolation=o.extrapolation,
        perturb=o.perturb,
        weight_decay=o.weight_decay,
    ),
    "extrapolated-adam": lambda params, o: ExtrapolatedAdam(
        params, lr=o.lr, weight_decay=o.weight_decay, extrapolation=o.extrapolation
    ),
    "adagrad-ota": lambda params, o: OverTheAirAdaGrad(params, o.lr, o.power, weight_decay=o.weight_decay),
    "adam-ota": lambda params, o: OverTheAirAdam(params, o.lr, o.power, weight_decay=o.weight_decay),
}


def _sift(params: Iterable[nn.Parameter], options: OptimizerOptions) -> SIFT:
    """Make SIFT around AdamW; gradients stay where they are, because they are measured, and averaged over ranks."""
    if not 0 < options.sift_rate <= 1:
        raise InvalidArgument(f"sift_rate must be above 0 and at most 1, got {options.sift_rate!r}")
    return SIFT(
        params,
        torch.optim.AdamW,
        lr=options.lr,
        weight_decay=options.weight_decay,
        rate=options.sift_rate,
        free_gradients=False,
    )


def make_optimizer(model: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Make the optimizer that ``--optimizer`` names, over a model's parameters.

    Args:
        model: The model.
        options: Its name and parameters.

    Returns:
        The optimizer.

    Raises:
        UnknownName: There is no such optimizer.
        InvalidArgument: A parameter is out of its range, or torch refuses it.
    """
    make = find("optimizer", options.optimizer, OPTIMIZERS)
    check_at_least(0, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay)
    try:
        return make((p for p in model.parameters() if p.requires_grad), options)
    except ValueError as error:
        raise InvalidArgument(f"--optimizer {options.optimizer}: {error}") from error
