"""The noisy quadratic on which MaxVA was shown: Adam, LaProp, MAdam and LaMAdam, each at its best learning rate.

    python -m benchmarks.companions.noisy_quadratic [--trials 4000]

x in two dimensions with curvatures 1 and 20, gradient h (x - 0.2 N) with fresh N ~ N(0, I), x_0 ~ N(0, I), 1,000 steps,
momentum 0.9, B in [0.5, 0.99]; the loss is sum h x^2 / 2 at the end. All trials are rows of one tensor, because the
optimizers work coordinate by coordinate. Learning rates, and beta_2 of Adam and LaProp, are chosen on 1,000 other
trials.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from adadagrad.optimizers import LaMAdam, MAdam
from benchmarks.companions.kept import table
from benchmarks.machine import machine, write_json

CURVATURES = torch.tensor([1.0, 20.0], dtype=torch.float64)
STEPS = 1000
RATES = [1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2]
BETAS = [0.5, 0.8, 0.9, 0.95, 0.99, 0.999]
Make = Callable[..., torch.optim.Optimizer]


def fixed(make: Make, beta: float) -> Make:
    """Return MAdam or LaMAdam with one beta, which is Adam or LaProp.

    Args:
        make: One of the two.
        beta: The weight of the past in the second moment.
    """
    return partial(make, beta_range=(beta, beta))


METHODS: dict[str, list[tuple[str, Make]]] = {
    "Adam": [(f"beta_2 {b}", fixed(MAdam, b)) for b in BETAS],
    "MAdam": [("B in [0.5, 0.99]", partial(MAdam, beta_range=(0.5, 0.99)))],
    "LaProp": [(f"beta_2 {b}", fixed(LaMAdam, b)) for b in BETAS],
    "LaMAdam": [("B in [0.5, 0.99]", partial(LaMAdam, beta_range=(0.5, 0.99)))],
}
"""By name: settings, of which the best on other trials is reported."""


def losses(make: Make, lr: float, trials: int, seed: int, steps: int = STEPS) -> torch.Tensor:
    """Return the last loss of each trial.

    Args:
        make: Makes the optimizer.
        lr: Its learning rate.
        trials: How many.
        seed: Of starts and noise.
        steps: Of each trial.

    Returns:
        (trials,) losses.
    """
    generator = torch.Generator().manual_seed(seed)
    x = nn.Parameter(torch.randn(trials, 2, generator=generator, dtype=torch.float64))
    optimizer = make([x], lr=lr)
    for _ in range(steps):
        noise = torch.randn(trials, 2, generator=generator, dtype=torch.float64)
        x.grad = CURVATURES * (x.detach() - 0.2 * noise)
        optimizer.step()
    return (CURVATURES * x.detach().square()).sum(1) / 2


def study(trials: int, tuning: int, steps: int = STEPS, rates: list[float] = RATES) -> list[dict[str, object]]:
    """Tune and run every method.

    Args:
        trials: Reported.
        tuning: Others, to choose on.
        steps: Of each trial.
        rates: To choose from.

    Returns:
        For each method its name, setting, rate, mean loss, and its standard error.
    """
    rows = []
    for name, settings in METHODS.items():
        tried = [(setting, make, lr) for setting, make in settings for lr in rates]
        scores = {(setting, lr): float(losses(make, lr, tuning, 1, steps).mean()) for setting, make, lr in tried}
        setting, lr = min(scores, key=lambda key: scores[key])
        found = losses(dict(settings)[setting], lr, trials, 0, steps)
        error = float(found.std() / trials**0.5)
        rows.append({"method": name, "setting": setting, "lr": lr, "loss": float(found.mean()), "error": error})
    return rows


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    chosen = parser.parse_args()
    rows = study(chosen.trials, 1000)
    write_json("companions/noisy_quadratic", {"rows": rows})
    cells = [
        [r["method"], r["setting"], f"{r['lr']:g}", f"{1e3 * r['loss']:.2f}e-3 ± {1e3 * r['error']:.2f}e-3"]  # type: ignore[str-bytes-safe, operator, list-item]
        for r in rows
    ]
    print(table(["method", "setting", "lr", "loss ± standard error"], cells))  # type: ignore[arg-type]
    print(machine())


if __name__ == "__main__":
    main()
