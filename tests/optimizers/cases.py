"""One row for each optimizer: what every common test needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from adadagrad.core.optimizing import Extrapolating, Reevaluating
from adadagrad.optimizers import MARS, MARSM, SIFT, AdaGradNorm, AdaRankGrad, LaMAdam, MAdam
from adadagrad.optimizers.extrapolated_adam import ExtrapolatedAdam
from adadagrad.optimizers.extrapolated_sgd import ExtrapolatedSGD
from adadagrad.optimizers.over_the_air import OverTheAirAdaGrad, OverTheAirAdam

Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Case:
    """An optimizer under some options.

    Args:
        name: Of the test.
        make: Takes parameters and options.
        lr: A rate at which it converges on the quadratic, from which it is lowered to 0.
        options: Beside the rate.
        rosenbrock: Rate and steps with which it goes down the valley.
        digits: Rate with which it learns the digits in 60 steps of the whole data.
        changes: Options, each with a value that changes what the optimizer does.
        compiles: Whether `step` compiles into one graph when `capturable` is given.
        scaleless: Options under which multiplying all gradients by a number changes nothing; None where there are none.
        shards: Whether it takes sharded parameters.
        delayed: Steps in which nothing moves yet.
    """

    name: str
    make: Make
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rosenbrock: tuple[float, int] = (0.02, 2000)
    digits: float = 0.02
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    compiles: bool = False
    scaleless: Mapping[str, Any] | None = field(default=None, hash=False)
    shards: bool = True
    delayed: int = 0

    def build(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        """Make it with the row's options, and others over them."""
        return self.make(params, **({"lr": self.lr} | dict(self.options) | options))

    def __str__(self) -> str:
        return self.name


ADAM_LIKE: dict[str, Any] = {"lr": 0.003, "eps": 0.1, "weight_decay": 0.3, "maximize": True}
CASES = [
    Case(
        "AdaGradNorm",
        AdaGradNorm,
        lr=2.0,
        rosenbrock=(2.0, 2000),
        digits=3.0,
        scaleless={"initial_accumulator": 1e-200},
    ),
    Case(
        "MARS",
        MARS,
        lr=0.1,
        changes={**ADAM_LIKE, "gamma": 0.09, "clip": False, "variant": "lion", "betas": (0.5, 0.6), "cautious": True},
        compiles=True,
        scaleless={"eps": 1e-300, "clip": False},
    ),
    Case(
        "MARS lion",
        MARS,
        lr=0.05,
        options={"variant": "lion", "which": "all"},
        compiles=True,
        digits=0.01,
        scaleless={"clip": False},
    ),
    Case(
        "MARS shampoo",
        MARS,
        lr=0.1,
        options={"variant": "shampoo"},
        rosenbrock=(0.05, 2000),
        digits=0.1,
    ),
    Case(
        "AdaRankGrad",
        AdaRankGrad,
        lr=0.1,
        options={"max_rank": 2, "scale": 1.0, "max_inner_steps": 5},
        digits=0.06,
        changes={**ADAM_LIKE, "betas": (0.5, 0.6), "max_rank": 1, "scale": 0.3, "rule": "momentum"},
        scaleless={"eps": 1e-300},
        shards=False,
    ),
    Case(
        "SIFT",
        SIFT,
        lr=0.1,
        options={"rate": 1.0, "weight_decay": 0.0},
        changes={"lr": 0.003, "eps": 0.1, "weight_decay": 0.3, "rate": 0.3},
        scaleless={"eps": 1e-300},
        shards=False,
        delayed=1,
    ),
    Case("MARS exact", MARS, lr=0.1, options={"mode": "exact", "gamma": 0.5}),
    Case(
        "MARSM", MARSM, lr=0.1, changes={"lr": 0.003, "beta": 0.5, "weight_decay": 0.3, "maximize": True}, digits=0.05
    ),
    Case(
        "MAdam",
        MAdam,
        lr=0.1,
        changes={**ADAM_LIKE, "momentum": 0.5, "beta_range": (0.7, 0.8), "nesterov": True, "moment_warmup": 2},
        compiles=True,
        scaleless={"eps": 1e-300},
    ),
    Case(
        "LaMAdam",
        LaMAdam,
        lr=0.1,
        changes={**ADAM_LIKE, "momentum": 0.5, "beta_range": (0.7, 0.8)},
        compiles=True,
        scaleless={"eps": 1e-300},
    ),
    Case(
        "ExtrapolatedSGD",
        ExtrapolatedSGD,
        lr=0.1,
        rosenbrock=(2e-4, 2000),
        digits=0.5,
        changes={
            **{"lr": 0.003, "momentum": 0.5, "extrapolation": 0.3, "nesterov": False, "weight_decay": 0.3},
            **{"perturb": "isotropic", "maximize": True},
        },
        shards=False,
    ),
    Case(
        "ExtrapolatedAdam",
        ExtrapolatedAdam,
        lr=0.1,
        changes={**ADAM_LIKE, "betas": (0.5, 0.6), "extrapolation": 0.3, "direction": "grad"},
        scaleless={"eps": 1e-300},
    ),
    Case(
        "ExtrapolatedAdam grad",
        ExtrapolatedAdam,
        lr=0.1,
        options={"direction": "grad", "extrapolation": 0.02},
        shards=False,
    ),
    Case(
        "OverTheAirAdaGrad",
        OverTheAirAdaGrad,
        lr=1.0,
        rosenbrock=(0.3, 2000),
        digits=0.1,
        changes={
            **{"lr": 0.03, "alpha": 1.2, "beta1": 0.5, "eps": 0.1, "weight_decay": 0.3},
            "maximize": True,
        },
        scaleless={"eps": 0.0},
    ),
    Case(
        "OverTheAirAdam",
        OverTheAirAdam,
        lr=0.1,
        rosenbrock=(0.005, 2000),
        digits=0.01,
        changes={**ADAM_LIKE, "alpha": 1.2, "betas": (0.5, 0.6)},
        scaleless={"eps": 0.0},
    ),
]


def take_step(optimizer: torch.optim.Optimizer, evaluate: Callable[[], float]) -> float:
    """One step in a plain loop, as the optimizer wants it: `evaluate` clears, computes and fills the gradients."""
    if isinstance(optimizer, Extrapolating):
        with optimizer.extrapolated():
            loss = evaluate()
        optimizer.step()
        return loss
    if isinstance(optimizer, Reevaluating) and optimizer.needs_closure:
        return float(optimizer.step(evaluate))
    loss = evaluate()
    optimizer.step()
    return loss
