"""Which entries to fine-tune: a perceptron trained on MNIST's digits 0 to 4, fine-tuned to 5 to 9, at four rates.

    python -m benchmarks.companions.sift_transfer --data DIR [--jobs 1]

A perceptron 784-256-256-5 learns 0 to 4 (three epochs of AdamW). Then 5 to 9 take the places of the five classes, and
200 steps of 64 images fine-tune it by SIFT around AdamW: the entries with the largest gradient over a first batch of 64
or of 4,096 images, the largest entries, or random ones, at 0.05, 0.2, 0.8 and 5 % of every tensor, the head's among
them; all entries; or the whole head alone. Four learning rates for each arm, up to two more beyond an end, chosen by
one run on the validation part; five other seeds on the test part.
"""

from __future__ import annotations

import argparse
import copy
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adadagrad.optimizers import SIFT
from benchmarks.companions.kept import results, spread, table, tuned
from benchmarks.machine import machine, write_json
from benchmarks.splits import mnist

STEPS, BATCH = 200, 64
RATES = (0.0005, 0.002, 0.008, 0.05)
LARGE = 4096
SELECTIONS = {
    "gradient": "gradient",
    f"gradient of {LARGE:,}": "gradient",
    "magnitude": "magnitude",
    "random": "random",
}
"""By what the table says: `SIFT`'s selection."""
GRID = (3e-3, 1e-2, 3e-2, 1e-1)


@lru_cache(maxsize=1)
def halves(folder: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return images and labels of the two halves, of each part.

    Args:
        folder: Where ``mnist/`` lies.
    """
    found = {}
    for part, data in mnist(folder)._asdict().items():
        images, labels = data.tensors
        for name, rows in (("first", labels < 5), ("second", labels >= 5)):
            found[f"{name} {part}"] = (images[rows].flatten(1), labels[rows] % 5)
    return found


@lru_cache(maxsize=8)
def pretrained(folder: str, seed: int, epochs: int) -> nn.Module:
    """Return a perceptron that knows 0 to 4.

    Args:
        folder: Where ``mnist/`` lies.
        seed: Of weights and order.
        epochs: Passes over the training part.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = halves(folder)["first train"]
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model


def run(
    *, arm: str, rate: float, lr: float, seed: int, part: str, data: str, steps: int = STEPS, epochs: int = 3
) -> dict[str, Any]:
    """Fine-tune one model.

    Args:
        arm: One of `SELECTIONS`, ``"all"`` or ``"head"``.
        rate: Share of each tensor's entries.
        lr: Of AdamW.
        seed: Of the pre-trained model, the order and random entries.
        part: ``"val"`` or ``"test"``.
        data: Where ``mnist/`` lies.
        steps: Of fine-tuning.
        epochs: Of pre-training.
    """
    model = copy.deepcopy(pretrained(data, seed, epochs))
    sets = halves(data)
    if arm == "head":
        for p in list(model.parameters())[:-2]:
            p.requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    options = {"rate": None if arm == "head" else 1.0}
    if arm in SELECTIONS:
        options = {"rate": rate, "selection": SELECTIONS[arm]}  # type: ignore[dict-item]
    optimizer = SIFT(params, torch.optim.AdamW, lr=lr, weight_decay=0.0, seed=seed, **options)  # type: ignore[arg-type]
    x, y = sets["second train"]
    order = torch.randint(len(x), (steps, BATCH), generator=torch.Generator().manual_seed(seed))
    for t, rows in enumerate(order):
        if t == 0 and arm == f"gradient of {LARGE:,}":  # the first step only chooses
            rows = torch.randint(len(x), (LARGE,), generator=torch.Generator().manual_seed(seed))
        F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        accuracy, before = (
            float((model(images).argmax(1) == labels).float().mean())
            for images, labels in (sets[f"second {part}"], sets[f"first {part}"])
        )
    shares = [row["gradient_share"] ** 2 for row in optimizer.report() if row["gradient_share"] is not None]
    trained = sum(row["chosen"] for row in optimizer.report())
    return {"metric": accuracy, "first": before, "share": sum(shares) / len(shares) if shares else None, "k": trained}


def study(data: str, jobs: int, seeds: int, **settings: Any) -> list[list[str]]:
    """Tune and run all arms.

    Args:
        data: Where ``mnist/`` lies.
        jobs: Processes.
        seeds: How many are reported.
        **settings: Of `run`, for every run.

    Returns:
        The rows of the table.
    """
    name = "sift_transfer"
    arms = [{"arm": arm, "rate": rate} for rate in RATES for arm in SELECTIONS]
    arms += [{"arm": "all", "rate": 1.0}, {"arm": "head", "rate": 1.0}]
    arms = [{**arm, "data": data, **settings} for arm in arms]
    best = tuned(name, run, arms, lambda _: GRID, higher=True, jobs=jobs, step=10**0.5, beyond=2)
    rows, content = [], []
    for arm, (lr, edge) in zip(arms, best, strict=True):
        found = results(name, run, [{**arm, "lr": lr, "seed": seed, "part": "test"} for seed in range(seeds)], jobs)
        content.append(found)
        share = [r["share"] for r in found if r["share"] is not None]
        rows.append([
            f"{100 * float(arm['rate']):g} %",
            str(arm["arm"]),
            f"{found[0]['k']:,}",
            f"{lr:.3g}{' (edge)' if edge else ''}",
            spread([r["metric"] for r in found], 4),
            f"{sum(share) / len(share):.2f}" if share else "",
        ])
    write_json(f"companions/{name}", {"arms": content})
    return rows


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds mnist/")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = study(chosen.data, chosen.jobs, chosen.seeds)
    print(table(["rate", "entries", "trained", "lr", "test accuracy on 5 to 9", "share of a tensor's |g|²"], rows))
    print(machine())


if __name__ == "__main__":
    main()
