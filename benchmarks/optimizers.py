"""What a step of each companion optimizer costs: time and state beside torch's own, on a transformer's parameters.

    python -m benchmarks.optimizers [--rounds 15] [--width 384] [--blocks 5]

Random gradients, no forward. Times are ratios of medians from runs that take turns in one process with one thread;
"control" is torch's AdamW a second time: how far it is from 1 is how far the others may be trusted. ExtrapolatedSGD is
timed with entering and leaving its context, beside torch's SGD with Nesterov momentum; SIFT with the hooks that take
its entries. Exact MARS is timed without the evaluations of its closure, which are two gradients in the place of one.
State is what the optimizer holds between two steps, beside that of AdamW, which is 8 bytes a weight.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from adadagrad.optimizers import (
    MARS,
    MARSM,
    SIFT,
    AdaRankGrad,
    ExtrapolatedAdam,
    ExtrapolatedSGD,
    LaMAdam,
    MAdam,
)
from benchmarks.companions.kept import table
from benchmarks.engine import ALLOCATOR
from benchmarks.machine import machine, write_json
from benchmarks.models import GPT

Make = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Row:
    """An optimizer to be timed.

    Args:
        name: Of the table.
        make: Takes named parameters.
        beside: Which of torch's it is divided by.
        bar: The ratio that this project has set itself; None for none.
    """

    name: str
    make: Make
    beside: str = "AdamW"
    bar: float | None = None


TORCH: dict[str, Make] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, nesterov=True, foreach=True),
}


def low_rank(rank: int) -> Make:
    """Return AdaRankGrad of one rank for all matrices.

    Args:
        rank: The rank.
    """
    return partial(AdaRankGrad, lr=1e-3, max_rank=rank, min_rank=rank)


ROWS = [
    Row("control: AdamW of torch", TORCH["AdamW"]),
    Row("MARS", partial(MARS, lr=1e-3), bar=1.6),
    Row("MARS, lion, nothing clipped", partial(MARS, lr=1e-3, variant="lion", clip=False)),
    Row("MARS, shampoo", partial(MARS, lr=1e-3, variant="shampoo")),
    Row("MARS, exact", partial(MARS, lr=1e-3, mode="exact")),
    Row("MARSM", partial(MARSM, lr=1e-3)),
    Row("MAdam", partial(MAdam, lr=1e-3), bar=2.2),
    Row("LaMAdam", partial(LaMAdam, lr=1e-3), bar=2.2),
    Row("AdaRankGrad, rank 32", low_rank(32)),
    Row("AdaRankGrad, rank 128", low_rank(128)),
    Row("SIFT, 1 % of the entries", partial(SIFT, lr=1e-3, rate=0.01), bar=0.6),
    Row("ExtrapolatedSGD", partial(ExtrapolatedSGD, lr=1e-3), "SGD", bar=1.5),
    Row("ExtrapolatedSGD, extrapolation 0", partial(ExtrapolatedSGD, lr=1e-3, extrapolation=0.0), "SGD"),
    Row("ExtrapolatedAdam", partial(ExtrapolatedAdam, lr=1e-3)),
]


class Timed:
    """A model's parameters under one optimizer.

    Args:
        make: Makes it.
        width: Of the model.
        blocks: Of the model.
    """

    def __init__(self, make: Make, width: int, blocks: int) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = GPT(length=64, width=width, heads=4, blocks=blocks)
        self.params = list(self.model.parameters())
        self.optimizer = make(list(self.model.named_parameters()))
        generator = torch.Generator().manual_seed(1)
        self.grads = [torch.randn(p.shape, generator=generator) for p in self.params]
        self.seconds: list[float] = []

    def step(self, *, timed: bool = True) -> None:
        """Do one step; gradients are there beforehand, but for SIFT, whose hooks run as a backward ends each of them.

        Args:
            timed: Whether it counts.
        """
        optimizer = self.optimizer
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad
        if isinstance(optimizer, MARS) and optimizer.needs_closure:
            started = time.perf_counter()
            optimizer.step(self._again)
        elif isinstance(optimizer, ExtrapolatedSGD | ExtrapolatedAdam):
            for p in self.params:
                p.grad = None
            started = time.perf_counter()
            with optimizer.extrapolated():
                for p, grad in zip(self.params, self.grads, strict=True):
                    p.grad = grad
            optimizer.step()
        else:
            started = time.perf_counter()
            if isinstance(optimizer, SIFT):
                for p in self.params:
                    optimizer._take(p)
            optimizer.step()
        if timed:
            self.seconds.append(time.perf_counter() - started)

    def state_bytes(self) -> tuple[int, int]:
        """Return the bytes of the state between two steps, now and at most."""
        if isinstance(self.optimizer, AdaRankGrad):
            found = self.optimizer.state_bytes()
            return found["current"], found["peak"]
        if isinstance(self.optimizer, SIFT):
            return self.optimizer.state_bytes(), self.optimizer.state_bytes()
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        total = sum(t.numel() * t.element_size() for t in tensors)
        return total, total

    def galore_bytes(self) -> int | None:
        """Return what GaLore would hold at the present ranks: 4 (m r + 2 n r) a matrix, and Adam for the rest."""
        if not isinstance(self.optimizer, AdaRankGrad):
            return None
        ranks, total = self.optimizer.ranks(), 0
        for name, p in self.optimizer.named():
            matrix = 4 * ranks[name] * (min(p.shape) + 2 * max(p.shape)) if name in ranks else 8 * p.numel()
            total += matrix
        return total

    def _again(self) -> float:
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad
        return 0.0


def compare(rows: list[Row], rounds: int, width: int, blocks: int) -> list[dict[str, Any]]:
    """Time all rows in turns.

    Args:
        rows: What is timed, beside torch's own.
        rounds: How often each.
        width: Of the model.
        blocks: Of the model.

    Returns:
        For each row its ratio, bytes a weight, and bytes beside AdamW's.
    """
    torch.set_num_threads(1)
    found = []
    for row in rows:  # one at a time beside torch's, so that memory and caches are those of two models
        pair = [Timed(TORCH[row.beside], width, blocks), Timed(row.make, width, blocks)]
        for _ in range(3):
            for one in pair:
                one.step(timed=False)
        for _ in range(rounds):
            for one in pair:
                one.step()
        theirs, ours = (median(one.seconds) for one in pair)
        weights = sum(p.numel() for p in pair[1].params)
        now, peak = pair[1].state_bytes()
        found.append({
            **{"name": row.name, "beside": row.beside, "bar": row.bar, "ratio": ours / theirs, "ms": 1e3 * ours},
            **{"bytes": now, "peak": peak, "of_adamw": now / (8 * weights), "galore": pair[1].galore_bytes()},
        })
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--only", help="rows whose name holds this word")
    chosen = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():  # as for the engine: freed memory is kept
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.optimizers", *sys.argv[1:]], os.environ | ALLOCATOR
        )
    rows = [row for row in ROWS if chosen.only is None or chosen.only.lower() in row.name.lower()]
    found = compare(rows, chosen.rounds, chosen.width, chosen.blocks)
    write_json("optimizers", {"rows": found})
    cells = [
        [
            *(r["name"], r["beside"], f"{r['ratio']:.2f}", "" if r["bar"] is None else f"{r['bar']:g}"),
            *(f"{r['ms']:.1f}", f"{r['bytes'] / 1e6:.2f}", f"{r['of_adamw']:.3f}"),
            "" if r["galore"] is None else f"{r['peak'] / r['galore']:.4f}",
        ]
        for r in found
    ]
    heads = ["optimizer", "beside", "time", "bar", "ms", "state, MB", "of AdamW's", "peak beside GaLore's"]
    print(table(heads, cells))
    weights = sum(p.numel() for p in GPT(length=64, width=chosen.width, heads=4, blocks=chosen.blocks).parameters())
    print(f"{weights:,} weights; {machine()}")


if __name__ == "__main__":
    main()
