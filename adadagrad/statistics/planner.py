r"""When to measure: a budget in modelled seconds, never a clock, so that runs repeat and ranks agree.

Every step earns ``max_overhead`` times its own modelled cost; a measurement is made as soon as it can be paid.
So the modelled average stays within `max_overhead`, small batches (where a measurement costs more than the
step) are measured rarely, and large ones at every step. The model counts flops, bytes and calls:

    plain step    3 forwards: 6 W T flop an example and layer, plus a fixed cost per layer and micro-batch
    measuring     T = 1: one read of input and output gradient; T > 1: one more weight gradient, 2 W T flop and
                  8 W bytes an example; inner products one more forward; coordinates one more weight gradient;
                  a layer that is done over one more forward and backward, 6 W T flop

W weights of the layer, T positions per example. The constants are rough and only set how often is "often";
`benchmarks/engine.py` measures what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adadagrad.core.checks import check_positive


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """Planning constants of a device type.

    Args:
        flops: Floating-point operations a second that layers reach.
        bytes: Bytes a second of memory traffic.
        call: Seconds to run one small operation, launch and Python included.
    """

    flops: float
    bytes: float
    call: float


RATES = {"cpu": DeviceRates(5e10, 8e9, 6e-6), "cuda": DeviceRates(3e13, 1.5e12, 8e-6)}
PLAIN_CALLS = 6
"""Operations of one layer's forward, backward and update in a plain step."""
MEASURED_CALLS = 14
"""Operations that measuring one layer adds, Python included."""


@dataclass(frozen=True, slots=True)
class LayerSize:
    """What the cost model knows of one layer call.

    Args:
        weights: W, its trainable weights.
        positions: T, positions per example.
        activations: Elements of input and output per example.
        reruns: Forwards and backwards of the layer that measuring it adds.
    """

    weights: int
    positions: int
    activations: int
    reruns: int = 0


@dataclass(frozen=True, slots=True)
class StepSize:
    """How large a step is, and the part of it that would be measured, on this rank.

    Args:
        examples: Examples of the step.
        micro_batches: Forwards they are split into.
        measured_examples: Measured examples.
        measured_micro_batches: Forwards these are split into.
    """

    examples: int
    micro_batches: int
    measured_examples: int
    measured_micro_batches: int


def plain_seconds(layers: Sequence[LayerSize], step: StepSize, device: str) -> float:
    """Return the modelled cost of a plain step.

    Args:
        layers: The model's layer calls.
        step: Its examples and micro-batches.
        device: Device type, ``"cpu"`` or ``"cuda"``; others count as ``"cuda"``.

    Returns:
        Seconds, for comparison with `measured_seconds` only.
    """
    rates = RATES.get(device, RATES["cuda"])
    flops = sum(6 * layer.weights * layer.positions for layer in layers) * step.examples
    traffic = sum(12 * layer.activations * step.examples + 12 * layer.weights for layer in layers)
    calls = PLAIN_CALLS * len(layers) * step.micro_batches
    return flops / rates.flops + traffic / rates.bytes + calls * rates.call


def measured_seconds(
    layers: Sequence[LayerSize],
    step: StepSize,
    device: str,
    *,
    inner_products: bool = False,
    coordinates: bool = False,
) -> float:
    """Return the modelled cost that measuring adds to a step.

    Args:
        layers: The model's layer calls.
        step: Its measured examples and micro-batches.
        device: Device type.
        inner_products: Whether <g_i, g> is wanted.
        coordinates: Whether the coordinate ratio is wanted.

    Returns:
        Seconds, for comparison with `plain_seconds` only.
    """
    rates = RATES.get(device, RATES["cuda"])
    flops = traffic = 0.0
    examples = step.measured_examples
    for layer in layers:
        product = 2 * layer.weights * layer.positions * examples
        materialised = 8 * layer.weights * examples
        many = layer.positions > 1
        flops += product * (many + inner_products + coordinates + 3 * layer.reruns)
        traffic += 4 * layer.activations * examples * (1 + inner_products) + materialised * (many + coordinates)
        traffic += 4 * layer.weights
    calls = MEASURED_CALLS * (1 + inner_products + coordinates) * len(layers) * step.measured_micro_batches
    return flops / rates.flops + traffic / rates.bytes + calls * rates.call


class MeasureBudget:
    """Decides step by step whether a measurement can be paid.

    Args:
        max_overhead: Share of the plain cost that may be spent, in (0, 1].

    Example:
        >>> budget = MeasureBudget(0.25)
        >>> [budget.due(plain=1.0, measured=0.5) for _ in range(7)]
        [True, False, False, True, False, True, False]
    """

    def __init__(self, max_overhead: float) -> None:
        check_positive(max_overhead=max_overhead)
        self.max_overhead = max_overhead
        self.credit: float | None = None
        """Modelled seconds earned and not yet spent; None before the first step, which is always measured."""

    def due(self, plain: float, measured: float) -> bool:
        """Earn this step's share and say whether to measure it.

        Args:
            plain: Modelled cost of the step without measuring.
            measured: Modelled cost of measuring it.

        Returns:
            Whether to measure; the cost is then spent.
        """
        first = self.credit is None
        credit = (self.credit or 0.0) + self.max_overhead * plain
        if first or credit >= measured:
            self.credit = min(credit - measured, measured)  # no hoard from steps that were cheap to measure
            return True
        self.credit = credit
        return False
