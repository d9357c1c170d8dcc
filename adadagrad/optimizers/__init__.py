"""Optimizers: plain `torch.optim.Optimizer`, one file an algorithm, no knowledge of batches."""

from adadagrad.optimizers.adagrad_norm import AdaGradNorm
from adadagrad.optimizers.adarankgrad import AdaRankGrad
from adadagrad.optimizers.extrapolated_adam import ExtrapolatedAdam
from adadagrad.optimizers.extrapolated_sgd import ExtrapolatedSGD
from adadagrad.optimizers.lamadam import LaMAdam
from adadagrad.optimizers.madam import MAdam
from adadagrad.optimizers.mars import MARS
from adadagrad.optimizers.mars_m import MARSM
from adadagrad.optimizers.over_the_air import OverTheAirAdaGrad, OverTheAirAdam
from adadagrad.optimizers.sift import SIFT

__all__ = [
    "MARS",
    "MARSM",
    "SIFT",
    "AdaGradNorm",
    "AdaRankGrad",
    "ExtrapolatedAdam",
    "ExtrapolatedSGD",
    "LaMAdam",
    "MAdam",
    "OverTheAirAdaGrad",
    "OverTheAirAdam",
]
