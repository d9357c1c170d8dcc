"""`recommended`: the policy, learning-rate rule and bounds that the study of defaults ended with."""

from __future__ import annotations

from typing import Any

import torch

from adadagrad.core.checks import check_integer
from adadagrad.core.errors import InvalidArgument
from adadagrad.core.settings import Bounds, Measure
from adadagrad.optimizers.adagrad_norm import AdaGradNorm
from adadagrad.policies.noise_scale import GradientNoiseScale
from adadagrad.rates.power import LinearScaling

FRACTION = 1.0
"""Share of the noise scale at which the batch is held."""
DECAY = 0.95
"""Of the averages of V and |grad F|^2 over measured steps, for the policy and the rate."""
GROWTH = 1.2
"""Largest growth from one measured step to the next, so that a lull in the averages does not make a huge batch."""
OVERHEAD = 0.2
"""Largest average share of a step's cost that measuring may take: averages of few measurements follow late."""


def recommended(optimizer: torch.optim.Optimizer, *, global_batch_size: int = 64) -> dict[str, Any]:
    r"""Return the arguments of `AdaptiveBatch` that the study in docs/results.md ended with, to be given with ``**``.

    The batch is held at a well-averaged noise scale, the point of diminishing returns, never below the first batch, for
    which the learning rate of the optimizer must have been chosen; and the learning rate follows the batch linearly.

    .. math:: b = c \, \frac{V}{\|\nabla F\|^2}, \qquad lr = lr_0 \, \frac{b}{b_0}

    In code: c is `FRACTION`. The two limit each other. Where SGD without momentum hovers about the minimum of a
    quadratic, its own noise keeps the gradient at

    .. math:: \frac{b \, \|\nabla F\|^2}{V} = \sum_j p_j \, \frac{lr \, h_j}{2 - lr \, h_j}

    with h_j the curvatures and p_j the share of V along each (derived, for noise independent along them). The policy
    holds this sum at c at most, and it is infinite where lr h_j reaches 2 along any of them: so the batch, and with
    it the rate, stops growing before linear scaling becomes unstable, as far as the averages keep up; with a single
    curvature at lr h = 2 c / (1 + c). As long as it is stable, linear scaling keeps what a pass through the data
    does: the same sum of learning rates, and the same ratio of rate to batch, which sets the noise.

    When to use it, and where it was seen to fail: docs/how-to-choose.md.

    Args:
        optimizer: The optimizer that will be trained with. The choice is the same for all that were studied.
        global_batch_size: First and smallest batch, for which the learning rate was chosen, >= 2 [examples].

    Returns:
        ``global_batch_size``, ``min_batch_size``, ``policy``, ``rate``, ``bounds`` and ``measure``.

    Raises:
        InvalidArgument: `optimizer` is no torch optimizer, or `global_batch_size` no integer >= 2.

    Source: this project, benchmarks/defaults.py; that b = B_noise is the point of diminishing returns is from
        McCandlish, Kaplan, Amodei (2018), arXiv 1812.06162 (from memory, unverified (high)).

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> recommended(torch.optim.SGD(model.parameters(), lr=0.1))["policy"]
        GradientNoiseScale(fraction=1.0, averaging=0.95)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgument(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    check_integer(2, global_batch_size=global_batch_size)
    return {
        "global_batch_size": global_batch_size,
        "min_batch_size": global_batch_size,
        "policy": GradientNoiseScale(fraction=FRACTION, averaging=DECAY),
        "rate": LinearScaling(),
        "bounds": Bounds(max_growth=GROWTH),
        "measure": Measure(max_overhead=OVERHEAD),
    }


def accumulator_memory(optimizer: torch.optim.Optimizer) -> float:
    """Return how an optimizer's accumulator of squared gradients forgets, for `AccumulatorScale`.

    Args:
        optimizer: One with an accumulator.

    Returns:
        1 for a sum, else the decay of the average.

    Raises:
        InvalidArgument: It has none, as far as is known.
    """
    memory = _memory(optimizer)
    if memory is None:
        raise InvalidArgument(
            f"rate accumulator needs an optimizer that divides by an accumulator of squared gradients, and "
            f"{type(optimizer).__name__} is not known as one: choose adascale, or give AccumulatorScale its memory"
        )
    return memory


def _memory(optimizer: torch.optim.Optimizer) -> float | None:
    """Return beta_2, alpha or 1, read off the first group; None for an optimizer without an accumulator."""
    if isinstance(optimizer, torch.optim.Adagrad | AdaGradNorm):
        return 1.0
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.RMSprop):
        return float(group["alpha"])
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.NAdam | torch.optim.RAdam):
        return float(group["betas"][1])
    return None
