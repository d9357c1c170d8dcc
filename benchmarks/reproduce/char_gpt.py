"""A character model in the manner of nanoGPT: does the batch that the noise asks for save steps, and at which loss?

    python -m benchmarks.reproduce.char_gpt --data DIR [--parts methods noise] [--seeds 3] [--jobs 1] [--show]

`methods`: the small model of `benchmarks.tasks` on tiny Shakespeare, AdamW, equal samples. A constant small and a
constant large batch, stages (8, then 32 from a quarter of the budget, then 128 from a half, with the square root of the
batch on the learning rate), the norm test as in the AdAdaGrad paper (eta 0.5), and the noise scale with linear scaling
as the library recommends. Each method's learning rate is the best of three on the validation part; losses are those of
the test part, in nats per character. Runs are shared with benchmarks/defaults.py, where they are the same. Published
losses at these settings: not at hand. The figure goes to results/char_gpt.png.

`noise`: the noise scale while training, beside the one that CerebrasResearch/nanoGNS prints for nanoGPT's
shakespeare-char at iteration 240 (verified there): batch 64, exponential average 0.95. There the model has 10.7 million
parameters and reads 256 characters, with dropout; here 0.8 million (4 blocks, width 128), 64 characters, no dropout: so
only the shape compares, low at first and rising from about iteration 120. A unit is a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

import adadagrad as ada
from benchmarks.defaults import CHOOSING_SEED
from benchmarks.machine import write_json
from benchmarks.models import GPT
from benchmarks.reproduce.losses import draw
from benchmarks.reproduce.study import Result, Study, cell, of_method, options, table
from benchmarks.runs import Config
from benchmarks.splits import LENGTH, shakespeare
from benchmarks.tasks import TASKS

TASK = TASKS["gpt"]
METHODS = {
    "constant 8": "constant 8",
    "constant 128": "constant 128",
    "staged": "staged 8, 32, 128",
    "paper 0.5": "norm test, eta 0.5",
    "recommended": "noise scale, recommended",
}
"""Names of runs, and what the table calls them."""
COLUMNS = (("loss", 4), ("steps", 0), ("mean_batch", 0), ("cpu_seconds", 1), ("measuring_seconds", 1))
ITERATIONS = (10, 60, 120, 180, 240, 300)
PUBLISHED = {240: (21.96, 0.9331, 20.49)}
"""By iteration: noise scale [sequences], squared gradient norm, tr Sigma."""
NOISE_BATCH, NOISE_LR, WARM_UP = 64, 1e-3, 100


def methods(study: Study, seeds: int) -> str:
    """Return the table of losses, and draw the curves."""
    chosen = study.choose(TASK, "adamw", list(METHODS), seed=CHOOSING_SEED)
    results = study.results(
        Config(TASK, "adamw", chosen[method], method, seed, "test") for seed in range(seeds) for method in chosen
    )
    rows, drawn = [], dict[str, list[Result]]()
    for method, label in METHODS.items():
        runs = of_method(results, method)
        if runs:
            drawn[label] = runs
        lr = f"{chosen[method]:g}" if method in chosen else "-"
        rows.append([label, lr, *(cell(runs, key, digits) for key, digits in COLUMNS), "not at hand"])
    if drawn:
        Path("results/char_gpt.png").write_bytes(draw(drawn, "tiny Shakespeare, AdamW"))
    names = ["test loss", "steps", "mean batch", "CPU seconds", "of which measuring", "published"]
    return table(["batch size by", "lr", *names], rows)


def noise(study: Study, seeds: int) -> str:
    """Return the table of noise scales, from seed 0 alone."""
    path = Path("results/char_gpt_noise.json")
    if not path.exists() and not study.show:
        write_json(path.stem, {"iterations": measure(study.folder, ITERATIONS)})
    found = json.loads(path.read_text())["iterations"] if path.exists() else {}
    rows = []
    for iteration in ITERATIONS:
        ours = [f"{value:.4g}" for value in found.get(str(iteration), ())] or ["-"] * 3
        published = [f"{value:.4g}" for value in PUBLISHED.get(iteration, ())] or ["not at hand"] * 3
        rows.append([str(iteration), *(f"{a} / {b}" for a, b in zip(ours, published, strict=True))])
    names = ("noise scale, sequences", "squared gradient norm", "tr Sigma")
    return table(["iteration", *(f"{name}, ours / published" for name in names)], rows)


def measure(folder: str, iterations: Sequence[int], width: int = 128) -> dict[str, tuple[float, float, float]]:
    """Train the model of the check, and return its averaged noise scale, squared gradient norm and tr Sigma.

    Args:
        folder: Where the text lies.
        iterations: After which, ascending; training ends with the last.
        width: Of the model.

    Returns:
        By iteration.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(length=LENGTH, width=width, heads=4, blocks=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=NOISE_LR, betas=(0.9, 0.99), weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / WARM_UP))
    meter = ada.GradientMeter(model, estimator=ada.ExponentialAverage(ada.PerExample(), decay=0.95))
    x, y = shakespeare(folder).train.tensors
    generator, found = torch.Generator().manual_seed(0), {}
    for iteration in range(1, iterations[-1] + 1):
        rows = torch.randint(0, len(x), (NOISE_BATCH,), generator=generator)
        optimizer.zero_grad()
        with meter:
            F.cross_entropy(model(x[rows]), y[rows]).backward()
        statistics = meter.statistics()
        optimizer.step()
        warm_up.step()
        if iteration in iterations:
            found[str(iteration)] = (statistics.noise_scale, statistics.true_grad_norm_sq, statistics.variance_trace)
            print(f"iteration {iteration}: noise scale {statistics.noise_scale:.4g}", flush=True)
    return found


PARTS = {"methods": methods, "noise": noise}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the tables and draw the figure.

    Args:
        arguments: The command line; None takes that of the process.
    """
    found = options(__doc__, list(PARTS), 3, arguments)
    study = Study("defaults", found.data, found.jobs, found.show)
    for part in found.parts:
        print(f"\n{part}, budget {TASK.budget:,}" if part == "methods" else f"\n{part}", flush=True)
        print(f"\n{PARTS[part](study, found.seeds)}", flush=True)


if __name__ == "__main__":
    main()
