"""The companion optimizers on a character GPT of 2.4 million weights: tiny Shakespeare, far below the published regime.

    python -m benchmarks.companions.char_gpt --data DIR [--jobs 2] [--steps 300] [--arms adamw-95 mars ...]

Every arm has the same budget for its learning rate: three a factor of 2 apart, up to two more where the best lies at
an end, one run each on the validation part. Then five other seeds, reported on the test part. 8 sequences of 64
characters a step, warm-up over 5 % and a cosine to 0, the gradient clipped to norm 1. Weights of matrices decay by 0.1;
not in the low-rank arms, whose published settings have none. The published runs train 50 to 320 times larger models,
with 960 times as many tokens in a step and 300 times as many steps: what loses here need not lose there.

"exact, half the steps" has as many gradient evaluations as the arms that evaluate once a step.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adadagrad.optimizers import MARS, AdaRankGrad, LaMAdam, MAdam
from benchmarks.companions.kept import results, spread, table, tuned
from benchmarks.machine import machine, write_json
from benchmarks.models import GPT
from benchmarks.splits import LENGTH, shakespeare

BATCH = 8
RANK = 64
Make = Callable[..., torch.optim.Optimizer]
LOW_RANK = {"max_rank": RANK, "max_inner_steps": 100}

ARMS: dict[str, tuple[str, Make, tuple[float, float, float]]] = {
    "adamw-95": ("AdamW (0.9, 0.95)", partial(torch.optim.AdamW, betas=(0.9, 0.95)), (1e-3, 2e-3, 4e-3)),
    "adamw-99": ("AdamW (0.95, 0.99)", partial(torch.optim.AdamW, betas=(0.95, 0.99)), (1e-3, 2e-3, 4e-3)),
    "mars-0": ("MARS, gamma 0 (clipping alone)", partial(MARS, gamma=0.0), (2e-3, 4e-3, 8e-3)),
    "mars": ("MARS, approximate", MARS, (2e-3, 4e-3, 8e-3)),
    "mars-exact": ("MARS, exact", partial(MARS, mode="exact"), (2e-3, 4e-3, 8e-3)),
    "mars-half": ("MARS, exact, half the steps", partial(MARS, mode="exact"), (2e-3, 4e-3, 8e-3)),
    "madam": ("MAdam", MAdam, (1e-3, 2e-3, 4e-3)),
    "lamadam": ("LaMAdam", LaMAdam, (1e-3, 2e-3, 4e-3)),
    "adarankgrad": (f"AdaRankGrad, rank at most {RANK}", partial(AdaRankGrad, **LOW_RANK), (4e-3, 8e-3, 1.6e-2)),
    "galore": (
        f"fixed rank {RANK}, as GaLore",
        partial(AdaRankGrad, **LOW_RANK, min_rank=RANK, switch_tolerance=0.0, second_moment_map="none"),
        (4e-3, 8e-3, 1.6e-2),
    ),
}
"""By key: what the table says, how the optimizer is made, and three learning rates."""


def groups(model: nn.Module, low_rank: bool) -> list[dict[str, Any]]:
    """Return the model's parameters in groups.

    Args:
        model: The GPT.
        low_rank: Whether only the blocks' matrices are trained in a subspace; else all matrices decay.
    """
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and (not low_rank or name.startswith("blocks"))]
    rest = [p for name, p in named if p.ndim != 2 or (low_rank and not name.startswith("blocks"))]
    if low_rank:
        return [{"params": inner}, {"params": rest, "max_rank": None}]
    return [{"params": inner, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def run(
    *, arm: str, lr: float, seed: int, part: str, steps: int, data: str, width: int = 256, blocks: int = 3
) -> dict[str, Any]:
    """Train one model.

    Args:
        arm: Key of `ARMS`.
        lr: Its learning rate.
        seed: Of weights and order.
        part: ``"val"`` or ``"test"``: where the metric is taken.
        steps: Of the arms that evaluate once a step.
        data: Folder with ``tinyshakespeare/``.
        width: Of the model.
        blocks: Of the model.
    """
    splits = shakespeare(data)
    torch.manual_seed(seed)
    model = GPT(length=LENGTH, width=width, heads=4, blocks=blocks)
    optimizer = ARMS[arm][1](groups(model, arm in ("adarankgrad", "galore")), lr=lr)
    steps = steps // 2 if arm == "mars-half" else steps
    inputs, targets = splits.train.tensors
    order = torch.randint(len(inputs), (steps, BATCH), generator=torch.Generator().manual_seed(seed))
    started, last, ranks = time.perf_counter(), 0.0, [0.0]
    for t, rows in enumerate(order):
        warm, done = min(1.0, (t + 1) / max(1, steps // 20)), t / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (1 + math.cos(math.pi * done)) / 2

        def closure(rows: torch.Tensor = rows) -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[rows]), targets[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss.item()

        last = 0.9 * last + 0.1 * float(optimizer.step(closure))  # type: ignore[arg-type]
        if isinstance(optimizer, AdaRankGrad):
            now = optimizer.ranks()
            ranks.append(sum(now.values()) / len(now))
    seconds = time.perf_counter() - started
    held = {"current": _bytes(optimizer), "peak": _bytes(optimizer)}
    more: dict[str, Any] = {}
    if isinstance(optimizer, AdaRankGrad):
        held = optimizer.state_bytes()
        more = {"rank_first": ranks[1], "rank_last": ranks[-1], "rank_falls": ranks[1:] == sorted(ranks[1:])[::-1]}
        more["switches"] = len(optimizer.switch_log)
        more["galore_bytes"] = sum(
            4 * optimizer.ranks()[name] * (min(p.shape) + 2 * max(p.shape))
            for name, p in optimizer.named()
            if name in optimizer.ranks()
        )
        more["subspace_bytes"] = held["current"] - sum(8 * p.numel() + 4 for p in optimizer.param_groups[1]["params"])
    return {"metric": _evaluate(model, getattr(splits, part)), "train": last, "seconds": seconds, "bytes": held, **more}


@torch.no_grad()
def _evaluate(model: nn.Module, data: Any) -> float | None:
    total, count = 0.0, 0
    for x, y in zip(*(tensor.split(64) for tensor in data.tensors), strict=True):
        total += float(F.cross_entropy(model(x), y, reduction="sum"))
        count += y.numel()
    return total / count if math.isfinite(total) else None


def _bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def study(arms: list[str], seeds: int, jobs: int, **settings: Any) -> str:
    """Tune, run and tabulate.

    Args:
        arms: Keys of `ARMS`.
        seeds: How many are reported.
        jobs: Processes.
        **settings: Of `run`, for every run.

    Returns:
        The table.
    """
    name, rows, content = "char_gpt", [], {}
    for arm in arms:
        settled = {"arm": arm, **settings}
        rates = ARMS[arm][2]
        ((lr, edge),) = tuned(
            name, run, [settled], lambda _, rates=rates: rates, higher=False, jobs=jobs, step=2.0, beyond=2
        )  # type: ignore[misc]
        runs = [{**settled, "lr": lr, "seed": seed, "part": "test"} for seed in range(seeds)]
        found = results(name, run, runs, jobs)
        content[arm] = found
        evaluations = settings["steps"] * (2 if arm == "mars-exact" else 1)
        first = found[0]
        rank = f"{first['rank_first']:.0f} to {first['rank_last']:.0f}" if "rank_last" in first else ""
        rows.append([
            ARMS[arm][0],
            f"{lr:g}{' (edge)' if edge else ''}",
            f"{evaluations:,}",
            spread([r["metric"] for r in found]),
            spread([r["train"] for r in found]),
            f"{first['bytes']['peak'] / 1e6:.1f}",
            rank,
            spread([r["seconds"] for r in found], 0),
        ])
        print(rows[-1], flush=True)
    write_json("companions/char_gpt", {"arms": content})
    heads = ["optimizer", "lr", "gradients", "test loss", "training loss", "state, MB", "mean rank", "seconds"]
    return table(heads, rows)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds tinyshakespeare/")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(study(chosen.arms, chosen.seeds, chosen.jobs, steps=chosen.steps, data=chosen.data))
    print(machine())


if __name__ == "__main__":
    main()
