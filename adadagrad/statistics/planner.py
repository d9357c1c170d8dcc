r"""When to measure: a budget in modelled seconds, never a clock, so that runs repeat and ranks agree.

Every step earns ``max_overhead`` times its own modelled cost; a measurement is made as soon as it can be paid.
So the modelled average stays within `max_overhead`, small batches (where a measurement costs more than the
step) are measured rarely, and large ones at every step. The model counts flops, bytes and calls:

    plain step    3 forwards: 6 W T flop an example and layer, plus a fixed cost per layer and micro-batch
    measuring     what each layer call adds (`layer_costs.py`), plus a fixed cost per layer and measured micro-batch,
                  plus what it costs to cut the step into more micro-batches than it would have

W weights of the layer, T positions per example. The constants are rough and only set how often is "often";
`benchmarks/engine.py` measures what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adadagrad.core.checks import check_positive
from adadagrad.statistics.layer_costs import RATES, LayerSize, NormsBy, layer_cost

PASS_CALLS = 20
"""Operations of a forward and backward that no layer has a part in: the loss, the optimizer's own."""
PLAIN_CALLS = 6
"""Operations of one layer's forward, backward and update in a plain step."""
STEP_CALLS = 120
"""Operations that measuring adds to a micro-batch whatever its layers. Python's time counts as that of operations, and
for more where measurements are rare: code that runs at one step in ten has left the caches."""
MEASURED_CALLS = 25
"""The same for one layer."""

SPLIT = 0.1
"""Share of a plain step that one more micro-batch costs beside its calls: kernels do less well on fewer examples."""
GRADIENT_BYTES = 16
"""Traffic of a weight in one more micro-batch: its gradient is written, read and added to another."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """How large a step is, and the part of it that would be measured, on this rank.

    Args:
        examples: Examples of the step.
        micro_batches: Forwards they are split into.
        measured_examples: Measured examples.
        measured_micro_batches: Forwards these are split into.
        extra_micro_batches: Forwards that the step has more of than one that is not measured.
    """

    examples: int
    micro_batches: int
    measured_examples: int
    measured_micro_batches: int
    extra_micro_batches: int = 0


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
    calls = (PASS_CALLS + PLAIN_CALLS * len(layers)) * step.micro_batches
    return flops / rates.flops + traffic / rates.bytes + calls * rates.call


def measured_seconds(layers: Sequence[LayerSize], step: StepSize, device: str, how: NormsBy | None = None) -> float:
    """Return the modelled cost that measuring adds to a step.

    Args:
        layers: The model's layer calls.
        step: Its measured examples and micro-batches.
        device: Device type.
        how: How norms are come by, and what else is wanted; None for exact norms alone, nothing fused.

    Returns:
        Seconds, for comparison with `plain_seconds` only.
    """
    how, rates = NormsBy() if how is None else how, RATES.get(device, RATES["cuda"])
    seconds = sum(layer_cost(layer, step.measured_examples, how, rates).seconds(rates) for layer in layers)
    kinds = 1 + how.inner_products + how.coordinates
    calls = (STEP_CALLS + MEASURED_CALLS * kinds * len(layers)) * step.measured_micro_batches
    calls += (PASS_CALLS + PLAIN_CALLS * len(layers)) * step.extra_micro_batches
    added = GRADIENT_BYTES * sum(layer.weights for layer in layers) * step.extra_micro_batches
    slower = SPLIT * step.extra_micro_batches * plain_seconds(layers, step, device)
    return seconds + slower + calls * rates.call + added / rates.bytes


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
