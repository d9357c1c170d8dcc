"""What the names of ``--rate`` stand for. To make a new rule known to the command line, add a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from adadagrad.cli.config import OptimizerOptions
from adadagrad.core.errors import UnknownName
from adadagrad.engine.recommended import accumulator_memory
from adadagrad.rates import LEGW, AccumulatorScale, AdamScale, AdaScale, LinearScaling, Seesaw, SquareRootScaling
from adadagrad.rates.base import AbstractRate

RATES: Mapping[str, Callable[[torch.optim.Optimizer, OptimizerOptions], AbstractRate | None]] = {
    "none": lambda optimizer, o: None,
    "adascale": lambda optimizer, o: AdaScale(o.base_batch_size, o.smoothing, o.progress_in),
    "adamscale": lambda optimizer, o: AdamScale(o.base_batch_size, o.smoothing, progress_in=o.progress_in),
    "accumulator": lambda optimizer, o: AccumulatorScale(
        accumulator_memory(optimizer), o.base_batch_size, o.smoothing, o.progress_in
    ),
    "linear": lambda optimizer, o: LinearScaling(o.base_batch_size),
    "sqrt": lambda optimizer, o: SquareRootScaling(o.base_batch_size),
    "legw": lambda optimizer, o: LEGW(o.legw_epochs, o.base_batch_size),
    "seesaw": lambda optimizer, o: Seesaw(o.base_batch_size),
}


def make_rate(optimizer: torch.optim.Optimizer, options: OptimizerOptions) -> AbstractRate | None:
    """Make the learning-rate rule that ``--rate`` names, other than the recommended one; None for ``none``."""
    if options.rate not in RATES:
        raise UnknownName("rate", options.rate, ("recommended", *RATES))
    return RATES[options.rate](optimizer, options)
