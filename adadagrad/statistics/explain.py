"""What is measured how, and what it is expected to cost: the text behind `explain()` of meter and engine.

Costs are the model's (`planner.py`), in flops and bytes of a measured step; the share is that of a plain step's
modelled seconds. They are not timed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from adadagrad.statistics.base import AbstractEstimator, AbstractInstrument
from adadagrad.statistics.coverage_table import RERUN, Row, reason, rows_of
from adadagrad.statistics.example_instrument import ExampleInstrument
from adadagrad.statistics.layer_costs import RATES, layer_cost
from adadagrad.statistics.planner import MEASURED_CALLS, StepSize, plain_seconds

_COLUMNS = ("layer", "class", "counted by", "positions", "parameters", "flop", "bytes", "of a step")


def explain(
    estimator: AbstractEstimator,
    instrument: AbstractInstrument,
    step: StepSize | None,
    device: str,
    every: int | None = None,
    max_overhead: float | None = None,
) -> str:
    """Return what is known of the measurement, as a text of several lines.

    Args:
        estimator: What measures.
        instrument: The same at work, between two steps.
        step: The sizes of a measured step, None where none is known.
        device: Device type.
        every: How often is measured, where that is fixed.
        max_overhead: Or the budget that decides.

    Returns:
        A table of layer calls, the share of the parameters that each rule covers, what the fallback counts and why, and
        how often a step would be measured.
    """
    lines, instrument = [repr(estimator)], instrument.innermost
    if isinstance(instrument, ExampleInstrument):
        lines += _layers(instrument, step, device)
    else:
        lines.append("counts every parameter by reading the gradients of whole micro-batches; no rule for a layer")
    if step is not None and (not isinstance(instrument, ExampleInstrument) or instrument.sizes):
        lines += ["", *_frequency(instrument, step, device, every, max_overhead)]
    return "\n".join(lines)


def _layers(instrument: ExampleInstrument, step: StepSize | None, device: str) -> list[str]:
    rows, known = rows_of(instrument), bool(instrument.sizes) and step is not None
    lines = []
    if not known:
        lines.append("nothing is measured yet: positions, sizes and costs come with the first measured step")
    table = [_COLUMNS if known else (*_COLUMNS[:3], "parameters")]
    for row in rows:
        number = f"{sum(p.numel() for p in row.parameters.values()):,}"
        if not known or step is None:
            table.append((row.name, row.kind, row.by, number))
            continue
        costs = _costs(instrument, row, step, device)
        positions = f"{row.size.positions:,}" if row.size is not None and row.size.weights else ""
        table.append((row.name, row.kind, row.by, positions, number, *costs))
    lines += ["", *_aligned(table), "", *_shares(rows)]
    for name in instrument.fallback:
        lines.append(f"rerun for {name}: {reason(instrument, name)}")
    return lines


def _costs(instrument: ExampleInstrument, row: Row, step: StepSize, device: str) -> tuple[str, str, str]:
    """Return flops, bytes and the share of a plain step that measuring one call adds."""
    if row.size is None or row.by == RERUN:
        return "", "", ""
    rates, how = RATES.get(device, RATES["cuda"]), instrument.norms_by
    cost = layer_cost(row.size, step.measured_examples, how, rates)
    calls = MEASURED_CALLS * (1 + how.inner_products + how.coordinates) * step.measured_micro_batches * rates.call
    plain = plain_seconds(list(instrument.sizes.values()), step, device)
    return _short(cost.flops), _short(cost.bytes), f"{(cost.seconds(rates) + calls) / plain:.1%}"


def _shares(rows: Sequence[Row]) -> list[str]:
    """Return what share of the trained parameters each rule covers; each parameter counts once."""
    by: dict[str, int] = defaultdict(int)
    seen = set()
    for row in rows:
        for p in row.parameters.values():
            if p not in seen:
                seen.add(p)
                by[row.by] += p.numel()
    total = sum(by.values())
    ordered = sorted(by.items(), key=lambda item: -item[1])
    return [f"{number / total:7.2%} of {total:,} parameters: {words}" for words, number in ordered]


def _frequency(
    instrument: AbstractInstrument, step: StepSize, device: str, every: int | None, max_overhead: float | None
) -> list[str]:
    plain, added = instrument.costs(step, device)
    share = added / plain if plain else 0.0
    lines = [
        f"by the model, a step of {step.examples:,} examples of which {step.measured_examples:,} are measured costs "
        f"{share:.1%} more than a plain one"
    ]
    if isinstance(instrument, ExampleInstrument) and instrument.fallback:
        lines.append(f"of that {2 * step.measured_examples / step.examples:.1%} for rerunning the model")
    if every is not None:
        lines.append(f"measured at every step: {share:.1%} on average" if every == 1 else _spaced(every, share))
    elif max_overhead is not None:
        often = max(1.0, share / max_overhead)
        lines.append(
            f"max_overhead={max_overhead:g}: "
            + ("every step is measured" if often == 1 else f"one step in {often:.3g} is measured")
        )
    return lines


def _spaced(every: int, share: float) -> str:
    return f"measured at one step in {every}: {share / every:.1%} on average"


def _short(value: float) -> str:
    """Return a number with three digits and a prefix."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with columns of one width, words to the left and numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
