r"""What ``estimator="auto"`` means: the cheapest way to know V equally well, by sizes and a cost model, never a clock.

`MicroBatch` where a module mixes examples. Otherwise `PerExample` until the sizes of the layers are known, and from
then on whichever of `PerExample` and `Probe` is expected to have the smaller product of cost and variance at the batch
size measured. Measuring n of many examples exactly has a relative variance of about c^2 / n, with c the coefficient of
variation of |g_i|^2; k probes add about v / k, which does not shrink with n because the examples share their signs.
Half the cost would buy half the examples, so the probe is the better bargain where

    MARGIN cost(probe) (1 + v n / (k c^2)) < cost(exact).

Measured with k = 4: c = 0.2 for a GPT on text after 20 to 150 steps (0.1 before), 0.1 to 3.5 for a small convolutional
network and 0.1 to 0.4 for a residual one on digits; the probes' relative error of V 0.02 to 0.05, 0.01 to 0.05 and 0.15
to 0.3. Hence c^2 = 0.04, v = 0.005 for linear layers and 0.1 for convolutions. These are rough, and so is the rule.

The model favours the probe: in two Linear layers, 16 examples and one thread of a busy machine, probes added 0.9, 0.6
and 1.0 of what exact norms did with 256, 512 and 768 features and 48, 96 and 128 positions, where the model says 0.5,
0.2 and 0.15. So the probe must be the better bargain by `MARGIN`. On a CPU that leaves `PerExample` for all models of
the benchmarks, and the probe for layers of 1024 features or more with so many positions that products of positions are
not cheaper: two Linear layers are sketched for 7 to 44 examples with 1024 features and 128 positions, for 2 to 115
with 2048 and 256, never with 2048 and 128. On an accelerator nothing has been timed. It never pays where coordinates
are wanted.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from adadagrad.statistics.base import AbstractEstimator, AbstractInstrument
from adadagrad.statistics.coverage import batch_coupled_module
from adadagrad.statistics.example_instrument import ExampleInstrument
from adadagrad.statistics.layer_costs import NormsBy
from adadagrad.statistics.micro_batch import MicroBatch
from adadagrad.statistics.per_example import PerExample
from adadagrad.statistics.planner import StepSize, measured_seconds
from adadagrad.statistics.probe import Probe

SPREAD = 0.04
"""c^2, relative variance of an example's squared gradient norm."""
MARGIN = 5.0
"""How much better a bargain the probe must seem: the model has been up to six times too favourable to it."""
PROBE_VARIANCE = {"linear": 0.005, "convolution": 0.1}
"""v, relative variance of V from a single probe."""


def choose_estimator(model: nn.Module) -> AbstractEstimator:
    """Return what ``estimator="auto"`` begins with: `PerExample`, or `MicroBatch` where a module mixes examples.

    Args:
        model: The model to be measured.

    Returns:
        An estimator with its default settings.
    """
    return PerExample() if batch_coupled_module(model) is None else MicroBatch()


def better_estimator(instrument: ExampleInstrument, step: StepSize, device: str) -> AbstractEstimator:
    """Return the better bargain of `PerExample` and `Probe`, with their default settings.

    Args:
        instrument: One of theirs, which knows the sizes of the layers and what is measured.
        step: The sizes of a measured step.
        device: Device type.

    Returns:
        `PerExample` while no size is known.
    """
    layers, how, probe = list(instrument.sizes.values()), instrument.norms_by, Probe()
    exact, sketched = replace(how, fuse=True, probes=0), replace(how, fuse=False, probes=probe.probes)
    factor = 1 + probe_variance(instrument, sketched) * step.measured_examples / (probe.probes * SPREAD)
    costs = [measured_seconds(layers, step, device, by) for by in (exact, sketched)]
    return probe if MARGIN * costs[1] * factor < costs[0] else PerExample()


def probe_variance(instrument: ExampleInstrument, how: NormsBy) -> float:
    """Return v, that of the worst layer which would be sketched; 0 where there is none.

    Args:
        instrument: Knows the sizes.
        how: How norms would be come by.
    """
    sketched = [size for size in instrument.sizes.values() if how.sketches(size)]
    return max((PROBE_VARIANCE["convolution" if size.thin else "linear"] for size in sketched), default=0.0)


def reconsidered(
    estimator: AbstractEstimator, instrument: AbstractInstrument, step: StepSize, device: str
) -> tuple[AbstractEstimator, AbstractInstrument]:
    """Return the estimator and instrument to go on with, once more is known than when ``"auto"`` chose.

    Args:
        estimator: The present choice.
        instrument: The present instrument, between two steps.
        step: The sizes of the step to come.
        device: Device type.

    Returns:
        The same two, or others that take over what has been learnt about the model.
    """
    if not isinstance(instrument, ExampleInstrument):
        return estimator, instrument
    better = better_estimator(instrument, step, device)
    if better == estimator:
        return estimator, instrument
    other = better.open(instrument.model, instrument.request)
    other.load_state_dict(instrument.state_dict())
    other.seconds = instrument.seconds
    return better, other
