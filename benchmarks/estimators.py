r"""How good the noise estimates are: bias, spread and coverage on a problem whose covariance is known in closed form.

    python -m benchmarks.estimators [--seeds 1000] [--batch 512]

Problem: linear regression in float64. Inputs x ~ N(0, H) with H = diag(1, 1/2, ..., 1/50), targets y = <w*, x> + noise
of variance 1, loss (<w, x> - y)^2 / 2, weights w that stay a fixed D = w - w* away from w*. With Gaussian inputs

    grad F = H D,   Sigma = (D^T H D + 1) H + (H D)(H D)^T,   tr Sigma = (D^T H D + 1) tr H + |H D|^2,

and the gradients' tails are heavier than Gaussian: each is a product of two Gaussian numbers. A seed is one batch; all
estimators see the same batches. "all" measures every example, "first n" the first n of the batch (what
`Measure(max_examples=n)` does), "n units" the batch in n micro-batches. s = |g|^2 is of the whole batch everywhere.

Columns: V over tr Sigma, mean minus 1 with its standard error, and standard deviation; the share of seeds in which the
interval of V contains tr Sigma, and that of the noise scale B = V / (s - V / b) the true one (nominal 0.80: each end is
one-sided at 0.90; the interval of B takes V and s at their worst together, so it should cover more); B over
tr Sigma / |grad F|^2, median minus 1, and the middle half's width over 1.349, which is the standard deviation where B
is normal. "spread of V at the cost of all" is what as many independent measurements as one of all examples costs would
have on average, the cost once counted in examples measured and once in extra flop; the examples of micro-batches count
in full, though only their mean gradients are read.

Extra flop are those of one measured batch of this model (d = 50 weights, one output) beside its plain forward and
backward: 2 (d + 1) an example for its norm and 2 d for its inner product with g; 6 d a unit, for two squared norms and
one inner product. For layers with many positions an example costs about one more weight gradient instead (see
docs/statistics.md), a unit still 6 d.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median, quantiles, stdev
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import adadagrad as ada
from adadagrad.batching import split_units
from adadagrad.core.records import GradientStatistics, Observation
from adadagrad.policies import AbstractPolicy
from adadagrad.policies.interval import LEVEL, requested_interval, student_quantile
from adadagrad.statistics.base import AbstractInstrument, Request
from benchmarks.machine import machine, write_json

D = 50
EIGENVALUES = 1 / torch.arange(1, D + 1, dtype=torch.float64)
OFFSET = torch.full((D,), 0.3, dtype=torch.float64)
HEADINGS = (
    "| estimator | examples measured | extra kflop | V: bias | V: spread | V: coverage "
    "| spread of V at the cost of all: examples | flop | B: bias | B: spread | B: coverage |\n" + "|---" * 11 + "|"
)


def truth() -> tuple[float, float]:
    """Return tr Sigma and |grad F|^2 of the problem, in closed form."""
    signal = float((EIGENVALUES * OFFSET).square().sum())
    residual = float((EIGENVALUES * OFFSET.square()).sum()) + 1
    return residual * float(EIGENVALUES.sum()) + signal, signal


def draw(b: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs (b, D) and targets (b, 1) for w* = 0."""
    x = torch.randn(b, D, dtype=torch.float64, generator=generator) * EIGENVALUES.sqrt()
    return x, torch.randn(b, 1, dtype=torch.float64, generator=generator)


@dataclass(frozen=True, slots=True)
class NoiseScale(AbstractPolicy):
    """Asks for B_noise, so that its interval is that of the noise scale."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad_norm_sq", "variance_trace"})

    def required_batch_size(self, observation: Observation) -> float:
        """Return B_noise in examples."""
        assert observation.gradient is not None
        return observation.gradient.noise_scale


@dataclass(frozen=True)
class Row:
    """An estimator and the part of the batch that it measures: the first so many examples, or so many units."""

    name: str
    examples: int | None = None
    units: int | None = None

    def measured(self, b: int) -> int:
        """Return how many examples of a batch of b are measured."""
        return min(self.examples or b, b)

    def flop(self, b: int) -> float:
        """Return the extra floating-point operations of one measured batch."""
        return 6 * D * self.units if self.units else (2 * (D + 1) + 2 * D) * self.measured(b)

    def splits(self, b: int) -> tuple[int, ...]:
        """Return the sizes of the measured micro-batches."""
        return split_units(b, b, self.units) if self.units else (self.measured(b),)


ROWS = [
    Row("PerExample, all"),
    *(Row(f"PerExample, first {n}", examples=n) for n in (256, 64, 16)),
    *(Row(f"MicroBatch, {n} units", units=n) for n in (16, 8, 4)),
]


def measurer(row: Row) -> Callable[[Tensor, Tensor], GradientStatistics]:
    """Return a function that measures a batch with an instrument and a model of its own.

    Args:
        row: The estimator.

    Returns:
        From inputs and targets to the record.
    """
    model = nn.Linear(D, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(OFFSET[None])
    estimator = ada.MicroBatch(units=row.units) if row.units else ada.PerExample()
    instrument: AbstractInstrument = estimator.open(model, Request(inner_products=True))

    def backward(x: Tensor, y: Tensor, b: int) -> None:
        ((model(x) - y).square().sum() / (2 * b)).backward()

    def measure(x: Tensor, y: Tensor) -> GradientStatistics:
        model.zero_grad()
        b, done = len(x), 0
        for n in row.splits(b):
            with instrument.micro_batch(n, 1 / b):
                backward(x[done : done + n], y[done : done + n], b)
            done += n
        if done < b:
            instrument.close_group()
            backward(x[done:], y[done:], b)
        return instrument.finish(b)

    return measure


def over_seeds(row: Row, seeds: Sequence[int], b: int) -> dict[str, list[float]]:
    """Measure one batch for each seed.

    Args:
        row: The estimator.
        seeds: At least two.
        b: Batch size [examples].

    Returns:
        By name, one number a seed: V and B over the truth, and whether (1 or 0) their intervals contain it.
    """
    trace, signal = truth()
    measure, policy = measurer(row), NoiseScale()
    found: dict[str, list[float]] = {"V": [], "V covered": [], "B": [], "B covered": []}
    for seed in seeds:
        record = measure(*draw(b, torch.Generator().manual_seed(seed)))
        assert record.num_units is not None
        assert record.variance_trace_error is not None
        half = student_quantile(LEVEL, record.num_units - 2) * record.variance_trace_error
        low, high = requested_interval(policy, Observation(gradient=record)) or (math.nan, math.nan)
        found["V"].append(record.variance_trace / trace)
        found["V covered"].append(float(abs(record.variance_trace - trace) <= half))
        found["B"].append(record.noise_scale * signal / trace)
        found["B covered"].append(float(low <= trace / signal <= high))
    return found


def table_row(row: Row, found: dict[str, list[float]], b: int) -> str:
    """Return one line of the table.

    Args:
        row: The estimator.
        found: From `over_seeds`.
        b: Batch size [examples].

    Returns:
        The line, in the order of `HEADINGS`.
    """
    spread, all_examples = stdev(found["V"]), ROWS[0]
    lower, _, upper = quantiles(found["B"], n=4)
    cells = [
        row.name,
        f"{row.measured(b)}",
        f"{row.flop(b) / 1e3:.1f}",
        f"{mean(found['V']) - 1:+.3f} ± {spread / len(found['V']) ** 0.5:.3f}",
        f"{spread:.3f}",
        f"{mean(found['V covered']):.2f}",
        f"{spread * (row.measured(b) / b) ** 0.5:.3f}",
        f"{spread * (row.flop(b) / all_examples.flop(b)) ** 0.5:.3f}",
        f"{median(found['B']) - 1:+.3f}",
        f"{(upper - lower) / 1.349:.3f}",
        f"{mean(found['B covered']):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure with every estimator and print the table.

    Args:
        arguments: The command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="batches that every estimator measures")
    parser.add_argument("--batch", type=int, default=512, help="examples in a batch, at least 32")
    options = parser.parse_args(arguments)
    if options.seeds < 2 or options.batch < 32:
        parser.error(f"--seeds must be >= 2 and --batch >= 32, got {options.seeds} and {options.batch}")
    torch.set_num_threads(1)
    trace, signal = truth()
    print(f"{options.seeds} seeds, b = {options.batch}, tr Sigma = {trace:.3f}, |grad F|^2 = {signal:.4f}, ", end="")
    print(f"noise scale {trace / signal:.1f}; {machine()}\n{HEADINGS}", flush=True)
    rows: dict[str, Any] = {}
    for row in ROWS:
        found = over_seeds(row, range(options.seeds), options.batch)
        costs = {"examples": row.measured(options.batch), "flop": row.flop(options.batch)}
        rows[row.name] = {**costs, **found}
        print(table_row(row, found, options.batch), flush=True)
    content = {"batch": options.batch, "seeds": options.seeds, "trace": trace, "signal": signal, "rows": rows}
    print("written to", write_json("estimators", content))


if __name__ == "__main__":
    main()
